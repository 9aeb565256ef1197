"""Random branched samples of a small vocabulary, packed for the trainer."""

from __future__ import annotations

import numpy as np

from npr_megatron.config.training import LossConfig
from npr_megatron.data.packing import pack
from npr_megatron.data.samples import sft_sample
from npr_megatron.records.sample import PackedBatch, TrainingSample
from npr_megatron.schema.render import render
from npr_megatron.topology.layout import layout_of
from npr_megatron.train.step import StepBatch
from tests.structures import SMALL, WORDS


def branched_sample(rng: np.random.Generator, num_blocks: int = 3) -> TrainingSample:
    """Return a sample of ``num_blocks`` forks with 2..4 branches of unequal lengths."""

    def text(low: int, high: int) -> list[int]:
        return rng.choice(WORDS, rng.integers(low, high)).tolist()

    blocks = []
    for _ in range(num_blocks):
        plans = [text(1, 3) for _ in range(rng.integers(2, 5))]
        blocks.append((plans, [text(1, 7) for _ in plans], text(1, 4)))
    prompt = text(3, 8)
    token_ids = [*prompt, *render(blocks, text(2, 5), SMALL)]
    return sft_sample(token_ids, len(prompt), layout_of(token_ids, len(prompt), SMALL))


def packed(
    seed: int,
    *,
    num_samples: int = 9,
    row_tokens: int = 448,
    rows_per_microbatch: int = 1,
    num_replicas: int = 4,
) -> tuple[PackedBatch, ...]:
    """Return microbatches with random advantages and rollout log-probs on the loss tokens."""
    rng = np.random.default_rng(seed)
    samples = [branched_sample(rng) for _ in range(num_samples)]
    microbatches = pack(samples, row_tokens, rows_per_microbatch, num_replicas)
    for batch in microbatches:
        has_loss = batch.labels >= 0
        batch.advantages[:] = rng.normal(size=batch.shape) * has_loss
        batch.rollout_logprobs[:] = (rng.normal(size=batch.shape) * 0.1 - 4.2) * has_loss
    return microbatches


def step_batches(kind: str, num_steps: int) -> tuple[StepBatch, ...]:
    """Return the global batches of ``num_steps`` steps under one loss."""
    return tuple(
        StepBatch(microbatches=packed(seed), loss=LossConfig(kind=kind))
        for seed in range(num_steps)
    )
