"""Which optimizers go with which layouts and formats."""

from __future__ import annotations

import pytest

from npr_megatron.config.optimizer_check import optimizer_problems
from npr_megatron.config.training import ParallelConfig, TrainerConfig

MUON = TrainerConfig(optimizer="muon", dtype="bf16")


@pytest.mark.parametrize(
    ("changes", "parallel", "complaints"),
    [
        ({}, {}, []),
        ({"optimizer": "adamw", "optimizer_offload_frac": 0.5}, {"dp_size": 2}, []),
        ({"optimizer_offload_frac": 0.5}, {}, ["optimizer_offload_frac is set; only AdamW's"]),
        ({"fp8_params": True}, {}, ["trainer.fp8_params is set"]),
        ({}, {"dp_size": 2, "overlap_data_parallel": True}, ["overlap_data_parallel is set"]),
        (
            {"optimizer": "adamw", "optimizer_offload_frac": 0.5, "dtype": "fp32"},
            {},
            ["offloads fp32 copies of bf16 weights only"],
        ),
        (
            {"optimizer": "adamw", "optimizer_offload_frac": 0.5, "fp8_params": True},
            {},
            ["cannot write FP8 weights"],
        ),
    ],
)
def test_every_problem_is_told(changes, parallel, complaints):
    trainer = MUON.model_copy(update=changes)
    problems = list(optimizer_problems(ParallelConfig(**parallel), trainer))
    assert len(problems) == len(complaints)
    for problem, complaint in zip(problems, complaints, strict=True):
        assert complaint in problem
