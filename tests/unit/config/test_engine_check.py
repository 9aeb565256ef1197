"""What an engine's backend cannot do is found before anything starts, all of it at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from npr_megatron.config.check import check_run
from npr_megatron.config.engine import EngineConfig, SglangConfig
from npr_megatron.config.engine_check import engine_problems
from npr_megatron.config.loader import load_run
from npr_megatron.config.model import ModelConfig, MoeConfig

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart" / "run.toml"
MODEL = ModelConfig(
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    vocab_size=90,
)
PARTLY_DENSE = MoeConfig(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, num_dense_layers=1
)


def sglang(**fields) -> EngineConfig:
    return EngineConfig.model_validate({"backend": "sglang", **fields})


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_a_model_that_can_be_cut_has_no_problem(tp_size):
    assert engine_problems(sglang(tp_size=tp_size), MODEL, "cpu") == []


@pytest.mark.parametrize(
    ("engine", "device", "said"),
    [
        (EngineConfig(tp_size=2), "cpu", "the embedded backend is cut by torchrun"),
        (EngineConfig(sglang=SglangConfig(dp_size=2)), "cpu", "raise fleet.num_replicas"),
        (sglang(weights="fp8"), "cpu", 'engine.weights is "fp8"'),
        (sglang(kv_after_push="keep"), "cpu", "set engine.sglang.overlap = false"),
        (sglang(sglang={"attention_backend": "fa3"}), "cpu", "on cpu one of torch_native"),
        (sglang(sglang={"attention_backend": "trtllm_mha"}), "cuda", "row by row, on cuda one of"),
        (sglang(sglang={"attention_backend": "fa3"}), "cuda", "computes in 16 bits"),
        (sglang(tp_size=3), "cpu", "num_attention_heads 4 is not a multiple of engine.tp_size 3"),
        (sglang(tp_size=5), "cpu", "intermediate_size 48 is not a multiple of engine.tp_size 5"),
        (sglang(tp_size=3), "cpu", "padded vocab_size 128 is not a multiple of engine.tp_size 3"),
        (sglang(tp_size=3), "cpu", "num_key_value_heads 2 and engine.tp_size 3 do not divide"),
    ],
)
def test_what_a_backend_cannot_do_is_named(engine, device, said):
    assert any(said in problem for problem in engine_problems(engine, MODEL, device))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"family": "glm4_moe"}, "of family glm4_moe and the SGLang backend is proven for qwen3"),
        ({"has_qk_norm": False}, "family qwen3 normalises queries and keys"),
        ({"family": "llama"}, "family llama has no query and key norms"),
        ({"family": "qwen3_moe", "moe": PARTLY_DENSE}, "the first 1 layers of the model have no"),
    ],
)
def test_models_that_sglang_was_not_proven_for_are_named(changed, said):
    problems = engine_problems(sglang(), MODEL.model_copy(update=changed), "cpu")
    assert any(said in problem for problem in problems)


def test_keys_and_values_are_kept_where_nothing_is_scheduled_ahead():
    engine = sglang(kv_after_push="keep", sglang={"overlap": False})
    assert engine_problems(engine, MODEL, "cpu") == []


def test_all_problems_are_told_together():
    bad = sglang(weights="fp8", tp_size=3, sglang={"attention_backend": "fa4"})
    assert len(engine_problems(bad, MODEL, "cuda")) >= 4


def test_a_replica_is_given_a_gpu_for_each_of_its_ranks():
    gpus = ["cluster.gpus_per_replica=1", "engine.backend=sglang", "engine.tp_size=2"]
    (problem,) = check_run(load_run(QUICKSTART, gpus))
    assert "set gpus_per_replica = 2" in problem
    assert check_run(load_run(QUICKSTART, ["cluster.gpus_per_replica=2", *gpus[1:]])) == []
    (problem,) = check_run(load_run(QUICKSTART, [*gpus, "engine.sglang.dp_size=3"]))
    assert "set gpus_per_replica = 6" in problem


def test_a_run_says_what_its_backend_cannot_do():
    (problem,) = check_run(load_run(QUICKSTART, ["engine.tp_size=2"]))
    assert "cut by torchrun" in problem
