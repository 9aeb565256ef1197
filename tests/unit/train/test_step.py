"""What a step accepts, and who takes which microbatch."""

from __future__ import annotations

import numpy as np
import pytest

from npr_megatron.config.training import LossConfig, ParallelConfig
from npr_megatron.errors import InputError
from npr_megatron.records.sample import PackedBatch
from npr_megatron.train.step import StepBatch


def microbatch(num_loss_tokens=1, shape=(2, 8)):
    integers = np.zeros(shape, np.int32)
    labels = np.full(shape, -1, np.int32)
    labels.flat[:num_loss_tokens] = 5
    return PackedBatch(
        token_ids=integers,
        position_ids=integers,
        segment=integers,
        block=integers,
        branch=integers,
        labels=labels,
        advantages=integers.astype(np.float32),
        rollout_logprobs=integers.astype(np.float32),
    )


def batch_of(*microbatches):
    return StepBatch(microbatches=microbatches, loss=LossConfig(kind="sft"))


def test_shares_of_all_ranks_are_the_batch_and_disjoint():
    microbatches = [microbatch() for _ in range(6)]
    parallel = ParallelConfig(dp_size=3)
    shares = [batch_of(*microbatches).share(rank, parallel) for rank in range(3)]
    assert sorted(id(batch) for share in shares for batch in share) == sorted(map(id, microbatches))


def test_tokens_are_counted_over_all_microbatches():
    batch = batch_of(microbatch(3), microbatch(0))
    assert (batch.num_loss_tokens, batch.num_tokens) == (3, 32)


@pytest.mark.parametrize(
    ("microbatches", "sizes", "complaint"),
    [
        ([], {}, "none"),
        ([microbatch(), microbatch(shape=(2, 16))], {}, "one shape"),
        ([microbatch()] * 3, {"dp_size": 2}, "over dp_size 2; pack with num_replicas = 2"),
        (
            [microbatch()] * 6,
            {"dp_size": 2, "pp_size": 2, "vpp_size": 2},
            "over dp_size 2, and over pp_size 2 in turns; pack with num_replicas = 4",
        ),
        ([microbatch()], {"tp_size": 3}, "rows of 8 tokens do not divide into the 3 slices"),
        ([microbatch()] * 4, {"tp_size": 4, "cp_size": 2}, "into the 16 slices of tp_size 4"),
    ],
)
def test_batches_the_layout_cannot_take_are_refused(microbatches, sizes, complaint):
    with pytest.raises(InputError, match=complaint):
        batch_of(*microbatches).share(0, ParallelConfig(**sizes))
