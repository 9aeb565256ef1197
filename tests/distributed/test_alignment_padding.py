"""Rows padded further than they need give the same loss, gradients, weights and token mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from npr_megatron.config.alignment import ROW_MULTIPLE, row_multiple
from npr_megatron.config.training import LossConfig, ParallelConfig, TrainerConfig
from npr_megatron.data.packing import pack
from npr_megatron.records.sample import PackedBatch, TrainingSample
from npr_megatron.train.step import StepBatch
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL, Job, learn, whole_model
from tests.distributed.parity import Run, compare
from tests.distributed.samples import branched_sample

NUM_STEPS = 2
LAYOUTS = {
    "one rank": ParallelConfig(),
    "tp2": ParallelConfig(tp_size=2),
    "cp2": ParallelConfig(cp_size=2),
}
WIDEST = row_multiple(ParallelConfig(tp_size=4, cp_size=4), TrainerConfig(fp8="mxfp8"))


def padding_is_learnt(batch: PackedBatch) -> PackedBatch:
    """Padding predicts token 0."""
    return replace(batch, labels=np.where(batch.segment < 0, 0, batch.labels))


def sample(rng: np.random.Generator) -> TrainingSample:
    drawn = branched_sample(rng)
    logprobs = (rng.normal(size=len(drawn.token_ids)) * 0.1 - 4.2).astype(np.float32)
    return replace(drawn, advantage=float(rng.normal()), rollout_logprobs=logprobs)


@cache
def steps(multiple: int) -> tuple[StepBatch, ...]:
    """The same samples whatever the multiple is."""
    rng = np.random.default_rng(11)
    drawn = [[sample(rng) for _ in range(7)] for _ in range(NUM_STEPS)]
    return tuple(
        StepBatch(microbatches=pack(samples, 448, 2, 1, multiple), loss=LossConfig(kind="dapo"))
        for samples in drawn
    )


@pytest.fixture(scope="module")
def train(hf_folder, tmp_path_factory) -> Callable[..., Run]:
    folder: Path = tmp_path_factory.mktemp("padding")

    def run(
        layout: str,
        multiple: int,
        change: Callable[[PackedBatch], PackedBatch] = lambda batch: batch,
    ) -> Run:
        batches = tuple(
            replace(step, microbatches=tuple(map(change, step.microbatches)))
            for step in steps(multiple)
        )
        parallel = LAYOUTS[layout]
        job = Job(hf_folder=hf_folder, parallel=parallel, batches=batches)
        ranks = run_ranks(learn, parallel.world_size, folder, job)
        return Run(
            ranks[0].results,
            whole_model([rank.gradients for rank in ranks], MODEL, parallel),
            whole_model([rank.storages for rank in ranks], MODEL, parallel),
            ranks,
        )

    return run


@pytest.fixture(scope="module")
def narrow(train) -> Run:
    return train("one rank", ROW_MULTIPLE)


def test_rows_are_padded_far_beyond_their_tokens():
    for plain, padded in zip(steps(ROW_MULTIPLE), steps(WIDEST), strict=True):
        lengths = [step.microbatches[0].shape[1] for step in (plain, padded)]
        assert lengths[1] == WIDEST > lengths[0]
        assert plain.num_tokens == padded.num_tokens
        assert plain.num_loss_tokens == padded.num_loss_tokens


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_touches_neither_loss_nor_gradients_nor_the_mean(layout, train, narrow):
    compare(train(layout, WIDEST), narrow)


def test_padding_that_is_learnt_shows(train, narrow):
    with pytest.raises(AssertionError, match="differs by"):
        compare(train("one rank", WIDEST, padding_is_learnt), narrow)
