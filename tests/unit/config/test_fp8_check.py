"""Rows are padded to what every rank can take, and each misuse of FP8 is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.config.alignment import ROW_MULTIPLE, fp8_multiple, row_multiple
from npr_megatron.config.device_memory import rank_memory
from npr_megatron.config.parallel_check import parallel_problems
from npr_megatron.config.training import ParallelConfig, TrainerConfig
from tests.unit.config.test_parallel_check import MODEL

FP8 = TrainerConfig(dtype="bf16", fp8="tensorwise", row_tokens=1024)
RECIPES = (None, "delayed", "tensorwise", "blockwise", "mxfp8")


@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from(RECIPES))
def test_rows_divide_into_slices_whose_tokens_the_recipe_takes(tp_size, cp_size, recipe):
    parallel = ParallelConfig(tp_size=tp_size, cp_size=cp_size)
    trainer = TrainerConfig(fp8=recipe)
    multiple = row_multiple(parallel, trainer)
    tokens = multiple // (tp_size * cp_size)
    assert multiple % ROW_MULTIPLE == 0
    assert multiple % parallel.row_slices == 0
    assert tokens % fp8_multiple(trainer) == 0
    for prime in (2, 3, 5, 7):
        less, rest = divmod(multiple, prime)
        assert (
            rest
            or less % ROW_MULTIPLE
            or less % parallel.row_slices
            or less % (fp8_multiple(trainer) * tp_size * cp_size)
        ), "a smaller multiple would do"


MISUSED = {
    # name: [parallel], [trainer] beside FP8, what must be said
    "params without recipe": (
        {},
        {"fp8": None, "fp8_params": True},
        "trainer.fp8_params: set, and trainer.fp8 is not",
    ),
    "bf16 layers without recipe": (
        {},
        {"fp8": None, "num_last_layers_bf16": 1},
        "trainer.num_last_layers_bf16: set, and trainer.fp8 is not",
    ),
    "delayed with bf16 layers": (
        {},
        {"fp8": "delayed", "num_first_layers_bf16": 1},
        "trainer.num_first_layers_bf16 1 and num_last_layers_bf16 0 leave layers in bf16 and "
        "delayed scaling spans all layers",
    ),
    "weights without a scale": (
        {},
        {"fp8": "delayed", "fp8_params": True},
        "would round weights that were just loaded by no scale at all",
    ),
    "more bf16 layers than a stage has": (
        {"pp_size": 8},
        {"num_first_layers_bf16": 4},
        "24 layers over parallel.pp_size 8 make 3 for each; set neither above 3",
    ),
    "no layer in FP8": (
        {},
        {"num_first_layers_bf16": 12, "num_last_layers_bf16": 12},
        "leave none of the 24 layers to FP8",
    ),
    "weights nobody sees": (
        {"dp_size": 2, "overlap_data_parallel": True},
        {"fp8": "mxfp8", "fp8_params": True},
        "nothing could be published",
    ),
}


@pytest.mark.parametrize("name", MISUSED)
def test_misuse_is_named(name):
    parallel, trainer, expected = MISUSED[name]
    problems = parallel_problems(ParallelConfig(**parallel), FP8.model_copy(update=trainer), MODEL)
    assert any(expected in problem for problem in problems), problems
    assert all("; " in problem for problem in problems), "a sentence says what to do"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_sound_section_has_no_problem(recipe):
    trainer = FP8.model_copy(update={"fp8": recipe, "fp8_params": recipe not in (None, "delayed")})
    assert parallel_problems(ParallelConfig(tp_size=2, cp_size=2), trainer, MODEL) == []


def test_memory_counts_the_copies_that_fp8_multiplies():
    parallel = ParallelConfig(pp_size=2)
    plain, fp8, kept, half = (
        [
            rank_memory(MODEL, parallel, FP8.model_copy(update=fields), stage).weights
            for stage in range(2)
        ]
        for fields in ({"fp8": None}, {}, {"fp8_params": True}, {"num_first_layers_bf16": 12})
    )
    copies = [many - few for many, few in zip(fp8, plain, strict=True)]
    assert copies[0] == copies[1] > 0
    assert kept == plain
    assert half == [plain[0], fp8[1]]
