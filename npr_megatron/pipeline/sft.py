"""The supervised loop of every stage and of ``npr sft``: batches, steps, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npr_megatron.config.alignment import row_multiple
from npr_megatron.config.stages import StageName
from npr_megatron.config.training import LossConfig
from npr_megatron.data.packing import pack
from npr_megatron.errors import DivergenceError
from npr_megatron.pipeline.context import RunContext
from npr_megatron.pipeline.ports import Learner
from npr_megatron.records.randomness import derive_seed, uniforms
from npr_megatron.records.sample import PackedBatch, TrainingSample
from npr_megatron.train.step import StepBatch, StepResult

SFT_LOSS = LossConfig(kind="sft")


def sft_steps(
    context: RunContext,
    stage: StageName,
    *,
    first_step: int,
    last_step: int,
    checkpoints: Path,
    samples_for: Callable[[int], Sequence[TrainingSample]],
) -> None:
    """Run optimizer steps ``first_step`` + 1 .. ``last_step`` of a stage.

    ``samples_for(step)`` must depend on the step alone: a resumed run sees the same batches.
    """
    config = context.config
    supervised_steps(
        context.trainer,
        first_step=first_step,
        last_step=last_step,
        checkpoint_every=config.checkpoint.every_sft_steps,
        checkpoints=checkpoints,
        progress={},
        batches_for=lambda step: pack(
            samples_for(step),
            row_tokens=config.trainer.row_tokens,
            rows_per_microbatch=config.trainer.rows_per_microbatch,
            num_replicas=config.parallel.microbatch_multiple,
            row_multiple=row_multiple(config.parallel, config.trainer),
        ),
        record=lambda step, result, seconds: context.record(
            stage, step, step_metrics(result, seconds)
        ),
        note=context.view.note,
    )


def supervised_steps(
    trainer: Learner,
    *,
    first_step: int,
    last_step: int,
    checkpoint_every: int,
    checkpoints: Path,
    progress: Mapping[str, Any],
    batches_for: Callable[[int], tuple[PackedBatch, ...]],
    record: Callable[[int, StepResult, float], None],
    note: Callable[[str], None],
    suspects: Callable[[int], str] | None = None,
) -> None:
    """Run optimizer steps ``first_step`` + 1 .. ``last_step`` and save on the way.

    Args:
        progress: JSON values stored in every checkpoint, beside the step.
        batches_for: the microbatches of a step; must depend on the step alone.
        record: called behind each step with its result and the seconds it took.
        note: told of steps that were skipped, and why.
        suspects: says what in the batch of a step may have made its numbers go wrong.

    Raises:
        DivergenceError: steps went wrong more often than the trainer skips; with the suspects.
    """
    for step in range(first_step + 1, last_step + 1):
        started = time.perf_counter()
        batch = StepBatch(microbatches=batches_for(step), loss=SFT_LOSS)
        try:
            result = trainer.train_step(batch)
        except DivergenceError as error:
            if suspects is None:
                raise
            raise DivergenceError(f"{error}; {suspects(step)}") from error
        if result.fault:
            # A gradient that is merely large is no single row's fault.
            is_a_number = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
            blamed = "" if suspects is None or is_a_number else f"; {suspects(step)}"
            note(f"step {step} was skipped: {result.fault}{blamed}")
        seconds = time.perf_counter() - started
        if step % checkpoint_every == 0 and step < last_step:  # the end is exported as a model
            trainer.save(checkpoints, {**progress, "step": step})
        record(step, result, seconds)


def step_metrics(result: StepResult, seconds: float) -> dict[str, float]:
    """Return what every supervised step is logged with."""
    return {
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": result.learning_rate,
        "train/entropy": result.mean_entropy,
        "train/skipped": float(result.skipped),
        "train/tokens_per_s": result.num_tokens / seconds,
        "step/s": seconds,
    }


def epoch_indices(num_samples: int, count: int, step: int, seed: int) -> list[int]:
    """Return which of ``num_samples`` samples step 1, 2, ... takes: shuffled epochs, end to end.

    Depends on the arguments alone. Within an epoch every sample comes once.
    """
    first = (step - 1) * count
    chosen: list[int] = []
    for epoch in range(first // num_samples, (first + count - 1) // num_samples + 1):
        key = np.full(num_samples, derive_seed("epoch", seed, epoch), dtype=np.uint64)
        order = np.argsort(uniforms(key, np.arange(num_samples, dtype=np.uint64)), kind="stable")
        start, stop = first - epoch * num_samples, first + count - epoch * num_samples
        chosen += order[max(start, 0) : min(stop, num_samples)].tolist()
    return chosen
