"""A supervised run goes on past a skipped step and tells whose fault it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from npr_megatron.errors import DivergenceError
from npr_megatron.pipeline.sft import supervised_steps
from npr_megatron.train.step import StepBatch, StepResult


class Steps:
    """A learner whose steps are given: a result, or the fault of one."""

    def __init__(self, *steps: StepResult | Exception) -> None:
        self._steps = iter(steps)

    def train_step(self, batch: StepBatch) -> StepResult:
        """Return the next."""
        step = next(self._steps)
        if isinstance(step, Exception):
            raise step
        return step


def result(loss: float = 1.0, fault: str = "") -> StepResult:
    return StepResult(
        loss=loss,
        grad_norm=1.0 if math.isfinite(loss) else math.nan,
        learning_rate=1e-3,
        num_loss_tokens=1,
        num_tokens=1,
        max_logprob_gap=0.0,
        mean_logprob_gap=0.0,
        mean_policy_logprob=-1.0,
        mean_entropy=1.0,
        skipped=bool(fault),
        fault=fault,
    )


def told_by(*steps: StepResult | Exception) -> tuple[list[str], list[int]]:
    """Run the steps; return the notes and which steps were recorded."""
    notes: list[str] = []
    recorded: list[int] = []
    trainer: Any = Steps(*steps)
    supervised_steps(
        trainer,
        first_step=0,
        last_step=len(steps),
        checkpoint_every=100,
        checkpoints=Path("unused"),
        progress={},
        batches_for=lambda _: (),
        record=lambda step, *_: recorded.append(step),
        note=notes.append,
        suspects=lambda step: f"row {step}0 is to blame",
    )
    return notes, recorded


def test_a_skipped_step_is_told_with_its_rows_and_the_run_goes_on():
    notes, recorded = told_by(result(), result(math.nan, "its sum is nan"), result())
    assert notes == ["step 2 was skipped: its sum is nan; row 20 is to blame"]
    assert recorded == [1, 2, 3]


def test_no_row_is_blamed_for_a_gradient_that_is_merely_large():
    notes, _ = told_by(result(), result(fault="the norm is 100"))
    assert notes == ["step 2 was skipped: the norm is 100"]


def test_the_error_that_ends_a_run_names_its_rows():
    with pytest.raises(DivergenceError, match="it ends; row 20 is to blame"):
        told_by(result(), DivergenceError("it ends"))
