"""Every combination of FP8 with a layout: what the checker lets pass, Megatron takes as meant.

Megatron's own configurations are built for all of them, without TransformerEngine and without a
device; only where Megatron asks for TransformerEngine's version it is told one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.parallel_check import parallel_problems
from npr_megatron.config.training import ParallelConfig, TrainerConfig
from tests.distributed.harness import run_ranks
from tests.distributed.models import MOE, UNTIED

DENSE = UNTIED.model_copy(
    update={"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 4}
)
EXPERTS = DENSE.model_copy(
    update={
        "family": MOE.family,
        "moe": MOE.moe and MOE.moe.model_copy(update={"moe_intermediate_size": 128}),
    }
)
LAYOUTS = (
    ParallelConfig(),
    ParallelConfig(tp_size=2),
    ParallelConfig(cp_size=2, dp_size=2),
    ParallelConfig(tp_size=2, cp_size=2, dp_size=2, overlap_data_parallel=True),
    ParallelConfig(pp_size=2),
    ParallelConfig(pp_size=4, tp_size=2),
    ParallelConfig(pp_size=2, vpp_size=2),
    ParallelConfig(pp_size=2, num_layers_in_first_stage=1),
    ParallelConfig(dp_size=2, overlap_data_parallel=True),
)
SPREAD = (*LAYOUTS, ParallelConfig(dp_size=2, ep_size=2), ParallelConfig(tp_size=2, etp_size=1))
RECIPES = (None, "delayed", "tensorwise", "blockwise", "mxfp8")
IN_BF16 = ((0, 0), (1, 1), (2, 1), (0, 3), (2, 2))
"""Layers at the start and at the end."""
REFUSALS = {
    "Delayed scaling does not support first / last layer": "delayed scaling spans all layers",
    "num_layers_at_start_in_bf16": "are counted within one stage",
    "num_layers_at_end_in_bf16": "are counted within one stage",
}
"""What Megatron says, and what must be said before Megatron is asked."""


@dataclass(frozen=True)
class Case:
    """One combination."""

    model: ModelConfig
    parallel: ParallelConfig
    trainer: TrainerConfig


@dataclass(frozen=True)
class Answer:
    """What became of one combination."""

    problems: list[str]
    refusal: str
    config: dict[str, Any]
    ddp: dict[str, Any]
    optimizer: dict[str, Any]


def cases() -> list[Case]:
    choices = itertools.product(RECIPES, (False, True), IN_BF16, ("none", "selective", "full"))
    return [
        Case(
            model,
            parallel,
            TrainerConfig(
                dtype="bf16",
                row_tokens=512,
                fp8=recipe,
                fp8_params=has_params,
                num_first_layers_bf16=first,
                num_last_layers_bf16=last,
                recompute=recompute,
            ),
        )
        for recipe, has_params, (first, last), recompute in choices
        for model, layouts in ((DENSE, LAYOUTS), (EXPERTS, SPREAD))
        for parallel in layouts
    ]


def ask_megatron(rank: int, world_size: int, init_method: str, asked: list[Case]) -> list[Answer]:
    """Build Megatron's configurations of every case."""
    import megatron.core.utils as megatron_utils
    from packaging.version import Version

    megatron_utils._te_version = Version("2.9.0")
    return [answer(case) for case in asked]


def answer(case: Case) -> Answer:
    import dataclasses

    import torch
    from megatron.core.optimizer import OptimizerConfig

    from npr_megatron.model.fp8 import fp8_optimizer_flags
    from npr_megatron.model.transformer_config import ddp_config, transformer_config

    problems = parallel_problems(case.parallel, case.trainer, case.model)
    try:
        config = transformer_config(case.model, case.parallel, case.trainer)
        ddp = ddp_config(case.parallel, case.trainer)
        optimizer = OptimizerConfig(
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=True,
            **fp8_optimizer_flags(case.trainer),
        )
    except (AssertionError, ValueError) as error:
        return Answer(problems, str(error), {}, {}, {})
    shown = [name for name in vars(config) if "fp8" in name or "bf16" in name]
    shown += ["moe_router_padding_for_quantization", "tp_only_amax_red"]
    return Answer(
        problems,
        "",
        {name: getattr(config, name) for name in shown},
        dataclasses.asdict(ddp),
        {name: getattr(optimizer, name) for name in vars(optimizer) if "fp8" in name},
    )


def ask_sizes(rank: int, world_size: int, init_method: str) -> dict[str, int]:
    from megatron.core.fp8_utils import get_fp8_align_size

    return {recipe: get_fp8_align_size(recipe) for recipe in RECIPES if recipe}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[tuple[Case, Answer]]:
    asked = cases()
    (found,) = run_ranks(ask_megatron, 1, tmp_path_factory.mktemp("fp8"), asked)
    return list(zip(asked, found, strict=True))


def test_what_passes_the_checker_is_built(answers):
    passed = [(case, found) for case, found in answers if not found.problems]
    assert [(case, found.refusal) for case, found in passed if found.refusal] == []
    met = {
        (case.trainer.fp8, case.trainer.fp8_params, case.model.moe is None) for case, _ in passed
    }
    with_fp8_weights = {recipe for recipe, has_params, _ in met if has_params}
    assert with_fp8_weights == {"tensorwise", "blockwise", "mxfp8"}
    assert len(met) == 2 * (len(RECIPES) + len(with_fp8_weights)), "every recipe, every model"
    assert {case.parallel for case, _ in passed} == {*SPREAD}


def test_what_megatron_refuses_has_a_sentence_of_its_own(answers):
    refused = [found for _, found in answers if found.refusal]
    for said, ours in REFUSALS.items():
        by_megatron = [found for found in refused if said in found.refusal]
        assert len(by_megatron) > 10, said
        assert all(any(ours in problem for problem in found.problems) for found in by_megatron)
    known = [found for found in refused if any(said in found.refusal for said in REFUSALS)]
    assert len(known) == len(refused), "Megatron refuses for a reason that is not listed"


def test_what_is_built_is_what_was_asked_for(answers):
    for case, found in answers:
        if found.problems:
            continue
        trainer, config = case.trainer, found.config
        in_fp8 = trainer.fp8 is not None
        assert config["fp8"] == (
            None if not in_fp8 else "e4m3" if trainer.fp8 in ("blockwise", "mxfp8") else "hybrid"
        )
        assert not in_fp8 or config["fp8_recipe"] == trainer.fp8
        assert config["fp8_param"] == found.ddp["fp8_param_gather"] == trainer.fp8_params
        assert not config["fp8_dot_product_attention"]
        assert not config["tp_only_amax_red"]
        first, last = trainer.num_first_layers_bf16, trainer.num_last_layers_bf16
        assert config["first_last_layers_bf16"] == (first + last > 0)
        if config["first_last_layers_bf16"]:
            assert config["num_layers_at_start_in_bf16"] == first
            assert config["num_layers_at_end_in_bf16"] == last
        has_experts = case.model.moe is not None
        assert config["moe_router_padding_for_quantization"] == (in_fp8 and has_experts)
        assert found.optimizer["fp8_recipe"] == (trainer.fp8 if trainer.fp8_params else None)
        shares = trainer.fp8_params and trainer.fp8 == "mxfp8"
        assert found.optimizer["reuse_grad_buf_for_mxfp8_param_ag"] == shares
        assert found.ddp["reuse_grad_buf_for_mxfp8_param_ag"] == shares


def test_the_sides_of_products_are_aligned_as_megatron_aligns_them(tmp_path):
    from npr_megatron.config.alignment import fp8_multiple

    (sizes,) = run_ranks(ask_sizes, 1, tmp_path)
    assert sizes == {recipe: fp8_multiple(TrainerConfig(fp8=recipe)) for recipe in sizes}
