"""Each rule between sections fires alone, on the quickstart with one thing changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from npr_megatron.config.check import check_all, check_run
from npr_megatron.config.loader import load_run
from tests.unit.config.hf_folders import write_qwen3

EXAMPLES = Path(__file__).parents[3] / "examples"
QUICKSTART = EXAMPLES / "quickstart" / "run.toml"
PHASE = "{num_steps=9, samples_per_step=2, optimizer={learning_rate=1}"

ONE_RULE_EACH = {
    "run.name=a/b": "run.name 'a/b' names a folder",
    "model.path=here": "model.path and [model.architecture] are both set",
    "task.min_parts=6": "task.min_parts 6 is above task.max_parts",
    "task.min_addend=10": "task.min_addend 10 is above task.max_addend 9",
    "engine.max_plans=2": "set engine.max_plans = ",
    "sampling.max_critical_path=9999": "is longer than all tokens together",
    "trainer.row_tokens=64": "do not fit trainer.row_tokens 64",
    "engine.num_kv_slots=100": "do not fit engine.num_kv_slots 100",
    "sampling.temperature=0": "makes all rollouts of a prompt equal",
    "parallel.cp_size=3": "with cp_size 3 cuts rows into 6 equal slices",
    "parallel.ep_size=2": "parallel.ep_size 2 or etp_size None spreads experts",
    "parallel.etp_size=1": "parallel.ep_size 1 or etp_size 1 spreads experts",
    "parallel.vpp_size=3": "parallel.pp_size 2 * vpp_size 3; change vpp_size",
    "parallel.overlap_data_parallel=true": "there is one replica, parallel.dp_size 1",
    "trainer.fp8=delayed": 'trainer.fp8 is "delayed"',
    "trainer.device_memory_gib=0.001": "trainer.device_memory_gib is 0.001",
    "model.architecture.family=llama": "family llama has no query and key norms",
    "model.architecture.has_qk_norm=false": "has_qk_norm is false",
    "model.architecture.moe={num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8}": (
        "family qwen3 is dense and moe is set"
    ),
    "parallel.pp_size=3": "num_hidden_layers 4 is not a multiple of parallel.pp_size 3",
    "model.architecture.head_dim=31": "head_dim 31 is odd",
    "model.architecture.max_position_embeddings=32": "run past max_position_embeddings 32",
    "seed_stage.phases=[]": "seed_stage.phases is empty",
    f"seed_stage.phases=[{PHASE}}}]": "seed_stage.phases.0.mixture is missing",
    f"seed_stage.phases=[{PHASE}, mixture={{broken=0.9}}}}]": "sum to 0.9",
    f"seed_stage.phases=[{PHASE}, mixture={{broken=1.5, hasty=-0.5}}}}]": "or are negative",
    "beta.mixture.broken=1.0": "BETA learns from accepted rollouts",
    "zero.optimizer.warmup_steps=1000": "leaves nothing of zero.num_steps",
    "evaluation.speed_problems=9999": "is above evaluation.num_problems",
    "engine.weights=fp8": "a push publishes weights as they are trained",
    "cluster.gpus_per_trainer=0.5": "takes one whole GPU (1) or none (0)",
}


@pytest.mark.parametrize("name", ["quickstart", "qwen3-4b"])
def test_the_examples_have_no_problem(name):
    assert check_run(load_run(EXAMPLES / name / "run.toml")) == []


@pytest.mark.parametrize("override", ONE_RULE_EACH)
def test_each_rule_fires_alone(override):
    found = check_run(load_run(QUICKSTART, [override]))
    assert [ONE_RULE_EACH[override] in problem for problem in found][:1] == [True]
    unrelated = [p for p in found if "seed_stage" not in p and ONE_RULE_EACH[override] not in p]
    assert unrelated == []


def test_all_problems_are_returned_together():
    config = load_run(QUICKSTART, ["parallel.pp_size=3", "parallel.tp_size=3", "run.name=-"])
    problems = check_run(config)
    for part in (
        "num_attention_heads 2 is not a multiple of parallel.tp_size 3",
        "intermediate_size 160 is not a multiple",
        "num_key_value_heads 2 and parallel.tp_size 3 do not divide each other",
        "num_hidden_layers 4",
        "cuts rows into 3 equal slices (sequence parallel",
        "run.name '-'",
    ):
        assert any(part in problem for problem in problems), part


def test_fewer_key_value_heads_than_ranks_are_fine_when_they_divide():
    config = load_run(
        QUICKSTART,
        [
            "parallel.tp_size=4",
            "model.architecture.num_attention_heads=8",
            "model.architecture.num_key_value_heads=2",
        ],
    )
    assert check_run(config) == []


def test_query_heads_must_be_shared_evenly():
    config = load_run(
        QUICKSTART,
        [
            "model.architecture.num_attention_heads=6",
            "model.architecture.num_key_value_heads=4",
        ],
    )
    assert "6 is not a multiple of num_key_value_heads 4" in check_run(config)[0]


def test_a_new_model_needs_its_seed_stage_and_the_sums_task(tmp_path):
    text = QUICKSTART.read_text()
    start, end = text.index('# -- stage "seed"'), text.index('# -- stage "zero"')
    path = tmp_path / "run.toml"
    path.write_text(text[:start] + text[end:])
    (problem,) = check_run(load_run(path))
    assert "untrained model and [seed_stage] is missing" in problem
    task = 'task={kind="jsonl", train_path="a", test_path="b"}'
    (problem,) = check_run(load_run(QUICKSTART, [task]))
    assert "a new model knows the sums alphabet only" in problem


def test_bf16_needs_gpus_like_dtypes_and_a_gap_above_rounding():
    problems = check_run(load_run(QUICKSTART, ["trainer.dtype=bf16"]))
    assert len(problems) == 3
    fixed = [
        "trainer.dtype=bf16",
        "engine.dtype=bf16",
        "cluster.gpus_per_trainer=1",
        "trainer.max_logprob_gap=0.1",
    ]
    assert check_run(load_run(QUICKSTART, fixed)) == []


def test_joining_a_cluster_excludes_starting_one():
    config = load_run(QUICKSTART, ["cluster.ray_address=auto", "cluster.ray_port=6379"])
    assert "joins a cluster" in check_run(config)[0]


def test_missing_model_and_data_are_reported_with_their_fields(tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text('{"id": "1", "question": "?"}\n')
    config = load_run(
        EXAMPLES / "qwen3-4b" / "run.toml",
        [f"model.path={tmp_path}/none", f"task.train_path={data}", f"task.test_path={tmp_path}/no"],
    )
    model, train, test = check_all(config)
    assert model.startswith("model.path: ")
    assert "none" in model
    assert train.startswith("task.train_path: ")
    assert "lacks answer" in train
    assert test.startswith("task.test_path: ")
    assert "does not exist" in test


def test_the_layout_is_checked_against_the_model_folder(tmp_path):
    problem_file = tmp_path / "p.jsonl"
    problem_file.write_text('\n{"id": "1", "question": "1+1?", "answer": "2"}\n')
    overrides = [
        f"model.path={write_qwen3(tmp_path / 'model')}",
        f"task.train_path={problem_file}",
        f"task.test_path={problem_file}",
    ]
    run_file = EXAMPLES / "qwen3-4b" / "run.toml"
    assert check_all(load_run(run_file, overrides)) == []
    (problem,) = check_all(load_run(run_file, [*overrides, "parallel.pp_size=8"]))
    assert "num_hidden_layers 36 is not a multiple of parallel.pp_size 8" in problem
