"""Each violation of ``[parallel]`` is named alone, and all of them together."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_megatron.config.device_memory import rank_memory
from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.config.parallel_check import parallel_problems
from npr_megatron.config.training import ParallelConfig, TrainerConfig

MODEL = ModelConfig(
    num_hidden_layers=24,
    hidden_size=256,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    intermediate_size=512,
    vocab_size=1024,
)
MOE = MODEL.model_copy(
    update={"moe": MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)}
)
BASE = {"tp_size": 4, "pp_size": 2, "dp_size": 2}
TRAINER = TrainerConfig(row_tokens=1024)

PLANTED: dict[str, tuple[dict, dict, dict, str]] = {
    # name: changes to the model, to [parallel] and to [trainer]; what must be said
    "heads": (
        {"num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 64},
        {},
        {},
        "num_attention_heads 10 is not a multiple of parallel.tp_size 4",
    ),
    "kv heads": (
        {"num_attention_heads": 12, "num_key_value_heads": 6},
        {},
        {},
        "num_key_value_heads 6 and parallel.tp_size 4 do not divide each other",
    ),
    "kv groups": (
        {"num_attention_heads": 8, "num_key_value_heads": 16},
        {},
        {},
        "num_attention_heads 8 is not a multiple of num_key_value_heads 16",
    ),
    "fused rows": (
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 6},
        {"tp_size": 8, "pp_size": 1, "dp_size": 1},
        {},
        "num_attention_heads 4 is not a multiple of parallel.tp_size 8",
    ),
    "inner width": (
        {"intermediate_size": 510},
        {},
        {},
        "intermediate_size 510 is not a multiple of parallel.tp_size 4",
    ),
    "layers": ({}, {"pp_size": 5}, {}, "24 is not a multiple of parallel.pp_size 5"),
    "chunks": ({}, {"vpp_size": 5}, {}, "parallel.pp_size 2 * vpp_size 5; change vpp_size"),
    "chunks of one stage": ({}, {"pp_size": 1, "vpp_size": 2}, {}, "there is one stage"),
    "uneven stages": (
        {},
        {"num_layers_in_first_stage": 10, "num_layers_in_last_stage": 10},
        {},
        "makes stages of [10, 10] layers, 20 together",
    ),
    "two rules of the split": (
        {},
        {
            "pipeline_layout": "Et*12|t*12L",
            "account_for_loss_in_pipeline_split": True,
        },
        {},
        "parallel.pipeline_layout replaces num_layers_in_first_stage",
    ),
    "layout string": ({}, {"pipeline_layout": "Et*12|t*13L"}, {}, "places 25 layers"),
    "rows": (
        {},
        {},
        {"row_tokens": 1026},
        "trainer.row_tokens is 1026; make it 10",
    ),
    "rows cut finely": (
        {"num_attention_heads": 32, "num_key_value_heads": 32},
        {"tp_size": 32, "dp_size": 1},
        {"row_tokens": 1040},
        "cuts rows into 32 equal slices (sequence parallel, and two for each rank of cp), so rows "
        "are padded to multiples of 32 tokens",
    ),
    "slices of context": (
        {},
        {"cp_size": 2},
        {"row_tokens": 1032},
        "parallel.tp_size 4 with cp_size 2 cuts rows into 16 equal slices",
    ),
    "experts of a dense model": (
        {},
        {"ep_size": 2},
        {},
        "parallel.ep_size 2 or etp_size None spreads experts and the model has none",
    ),
    "expert ranks": ({"moe": MOE.moe}, {"ep_size": 8}, {}, "does not divide the 8 ranks"),
    "experts": (
        {"moe": MOE.moe},
        {"ep_size": 3, "etp_size": 1, "dp_size": 3},
        {},
        "num_experts 8 is not a multiple of parallel.ep_size 3",
    ),
    "expert width": (
        {"moe": MOE.moe},
        {"etp_size": 3, "dp_size": 3},
        {},
        "moe_intermediate_size 64 is not a multiple of parallel.etp_size 3",
    ),
    "fp8 width": (
        {"intermediate_size": 520},
        {},
        {"fp8": "delayed", "dtype": "bf16"},
        "intermediate_size is 520 over 4 ranks, and delayed FP8",
    ),
    "fp8 blocks": (
        {"hidden_size": 272},
        {},
        {"fp8": "mxfp8", "dtype": "bf16"},
        "hidden_size is 272, and mxfp8 FP8 multiplies matrices whose sides are multiples of 32",
    ),
    "fp8 tokens": (
        {},
        {"cp_size": 2},
        {"fp8": "tensorwise", "dtype": "bf16", "row_tokens": 1040},
        "tensorwise FP8 takes 16 tokens at a time, so rows are padded to multiples of 128 tokens",
    ),
    "fp8 of fp32": ({}, {}, {"fp8": "blockwise"}, 'set dtype = "bf16"'),
    "memory": ({}, {}, {"device_memory_gib": 0.01}, "and trainer.device_memory_gib is 0.01"),
}


def found(model: dict, parallel: dict, trainer: dict) -> list[str]:
    return parallel_problems(
        ParallelConfig(**BASE | parallel),
        TRAINER.model_copy(update=trainer),
        MODEL.model_copy(update=model),
    )


def test_a_sound_section_has_no_problem():
    assert found({}, {}, {"device_memory_gib": 4.0}) == []
    assert found({"moe": MOE.moe}, {"ep_size": 4, "etp_size": 2}, {}) == []


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_named(name):
    model, parallel, trainer, expected = PLANTED[name]
    problems = found(model, parallel, trainer)
    assert any(expected in problem for problem in problems), problems
    assert all("; " in problem for problem in problems), "a sentence says what to do"


INDEPENDENT = (
    "inner width",
    "layers",
    "rows",
    "experts of a dense model",
    "fp8 of fp32",
)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.sampled_from(INDEPENDENT), min_size=1))
def test_all_violations_are_named_together(names):
    chosen = [PLANTED[name] for name in names]
    changes = [
        dict(itertools.chain.from_iterable(part.items() for part in parts))
        for parts in zip(*(entry[:3] for entry in chosen), strict=True)
    ]
    problems = found(*changes)
    for entry in chosen:
        assert sum(entry[3] in problem for problem in problems) == 1, (entry[3], problems)


def test_a_vocabulary_of_any_size_is_padded():
    odd = MODEL.model_copy(update={"vocab_size": 1021})
    assert parallel_problems(ParallelConfig(tp_size=4), TRAINER, odd) == []
    assert parallel_problems(ParallelConfig(tp_size=4, vocab_divisor=128), TRAINER, odd) == []
    stages = [
        rank_memory(odd, ParallelConfig(vocab_divisor=divisor), TRAINER, 0) for divisor in (1, 128)
    ]
    rows = [stage.weights // MODEL.hidden_size // 4 for stage in stages]
    assert rows[1] - rows[0] == 1024 - 1021


def test_without_a_model_the_rules_about_its_shape_are_skipped():
    assert parallel_problems(ParallelConfig(tp_size=4, pp_size=5), TRAINER, None) == []
    (problem,) = parallel_problems(ParallelConfig(tp_size=3), TRAINER, None)
    assert "cuts rows into 3 equal slices" in problem


def test_memory_names_the_fullest_stage_and_its_parts():
    big = MODEL.model_copy(update={"vocab_size": 2**20})
    parallel = ParallelConfig(pp_size=2)
    problems = parallel_problems(parallel, TrainerConfig(device_memory_gib=4, row_tokens=64), big)
    (problem,) = problems
    assert "a rank of stage 0" in problem, "twice as many microbatches wait there"
    first, last = (rank_memory(big, parallel, TRAINER, stage) for stage in range(2))
    assert (first.weights, first.gradients) == (first.gradients, last.weights - 4 * 256)
    assert last.optimizer == 2 * last.weights


@pytest.mark.parametrize("field", ["tp_size", "dp_size", "pp_size"])
def test_more_ranks_need_less_memory_each(field):
    trainer = TrainerConfig(row_tokens=1024, dtype="bf16")
    needed = [
        max(rank_memory(MODEL, parallel, trainer, stage).total for stage in range(parallel.pp_size))
        for parallel in (ParallelConfig(**{field: size}) for size in (1, 2, 4))
    ]
    assert needed == sorted(needed, reverse=True)
    assert needed[2] < needed[0]
