"""The supervised loop of the seed model and of BETA: batches, optimizer steps, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from npr_megatron.config.stages import StageName
from npr_megatron.config.training import LossConfig
from npr_megatron.data.packing import pack
from npr_megatron.pipeline.context import RunContext
from npr_megatron.records.randomness import derive_seed, uniforms
from npr_megatron.records.sample import TrainingSample
from npr_megatron.train.step import StepBatch

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
    every = config.checkpoint.every_sft_steps
    for step in range(first_step + 1, last_step + 1):
        started = time.perf_counter()
        microbatches = pack(
            samples_for(step),
            row_tokens=config.trainer.row_tokens,
            rows_per_microbatch=config.trainer.rows_per_microbatch,
            num_replicas=config.parallel.dp_size,
        )
        result = context.trainer.train_step(StepBatch(microbatches=microbatches, loss=SFT_LOSS))
        seconds = time.perf_counter() - started
        if step % every == 0 and step < last_step:  # at the end the model itself is exported
            context.trainer.save(checkpoints, {"step": step})
        context.record(
            stage,
            step,
            {
                "train/loss": result.loss,
                "train/grad_norm": result.grad_norm,
                "train/learning_rate": result.learning_rate,
                "train/tokens_per_s": result.num_tokens / seconds,
                "step/s": seconds,
            },
        )


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
