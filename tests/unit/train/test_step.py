"""What a step accepts, and who takes which microbatch."""

from __future__ import annotations

import numpy as np
import pytest

from npr_megatron.config.training import LossConfig
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
    shares = [batch_of(*microbatches).share(rank, 3, 1) for rank in range(3)]
    assert sorted(id(batch) for share in shares for batch in share) == sorted(map(id, microbatches))


def test_tokens_are_counted_over_all_microbatches():
    batch = batch_of(microbatch(3), microbatch(0))
    assert (batch.num_loss_tokens, batch.num_tokens) == (3, 32)


@pytest.mark.parametrize(
    ("microbatches", "dp_size", "tp_size", "complaint"),
    [
        ([], 1, 1, "none"),
        ([microbatch(), microbatch(shape=(2, 16))], 1, 1, "one shape"),
        ([microbatch()] * 3, 2, 1, "do not divide over dp_size 2"),
        ([microbatch()], 1, 3, "rows of 8 tokens do not divide over tp_size 3"),
    ],
)
def test_batches_the_layout_cannot_take_are_refused(microbatches, dp_size, tp_size, complaint):
    with pytest.raises(InputError, match=complaint):
        batch_of(*microbatches).share(0, dp_size, tp_size)
