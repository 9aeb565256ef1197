"""Packing against a slow cell-by-cell reading of its output."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_megatron.data.packing import first_fit_decreasing, pack
from npr_megatron.errors import InputError
from npr_megatron.records.sample import PackedBatch, TrainingSample


def make_sample(length: int, key: int, *, learnt_share: float = 0.6) -> TrainingSample:
    """A sample whose streams are all different numbers, with a random predecessor tree."""
    rng = np.random.default_rng(key)
    predecessor = np.arange(-1, length - 1)
    predecessor[rng.random(length) < 0.2] = -1
    return TrainingSample(
        token_ids=rng.integers(0, 1000, length).astype(np.int32),
        position_ids=rng.integers(0, 1000, length).astype(np.int32),
        block=rng.integers(0, 4, length).astype(np.int32),
        branch=rng.integers(0, 4, length).astype(np.int32),
        predecessor=predecessor.astype(np.int32),
        loss_mask=(predecessor >= 0) & (rng.random(length) < learnt_share),
        advantage=float(rng.normal()),
        rollout_logprobs=rng.normal(size=length).astype(np.float32),
    )


def unpack(batches: tuple[PackedBatch, ...]) -> list[dict[str, object]]:
    """Read samples back, one cell at a time."""
    found = []
    for batch in batches:
        rows, length = batch.shape
        for row in range(rows):
            for segment in range(int(batch.segment[row].max()) + 1):
                cells = [s for s in range(length) if batch.segment[row, s] == segment]
                assert cells == list(range(cells[0], cells[-1] + 1)), "a sample is split"
                found.append(
                    {
                        name: [getattr(batch, name)[row, s].item() for s in cells]
                        for name in (
                            "token_ids",
                            "position_ids",
                            "block",
                            "branch",
                            "labels",
                            "advantages",
                            "rollout_logprobs",
                        )
                    }
                )
    return found


def expected(sample: TrainingSample) -> dict[str, object]:
    """What the cells of a sample must hold, token by token."""
    length = len(sample.token_ids)
    labels, advantages, logprobs = [-1] * length, [0.0] * length, [0.0] * length
    for t in range(length):
        if sample.loss_mask[t]:
            labels[sample.predecessor[t]] = sample.token_ids[t].item()
            advantages[sample.predecessor[t]] = np.float32(sample.advantage).item()
            logprobs[sample.predecessor[t]] = sample.rollout_logprobs[t].item()
    return {
        "token_ids": sample.token_ids.tolist(),
        "position_ids": sample.position_ids.tolist(),
        "block": sample.block.tolist(),
        "branch": sample.branch.tolist(),
        "labels": labels,
        "advantages": advantages,
        "rollout_logprobs": logprobs,
    }


shapes = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(40, 90),
    st.integers(1, 5),
    st.integers(1, 3),
)


@settings(max_examples=50, deadline=None)
@given(shapes)
def test_every_sample_comes_back_whole_and_once(case):
    lengths, row_tokens, rows, replicas = case
    samples = [make_sample(length, key) for key, length in enumerate(lengths)]
    found = unpack(pack(samples, row_tokens, rows, replicas))
    assert sorted(map(repr, found)) == sorted(repr(expected(sample)) for sample in samples)


@settings(max_examples=50, deadline=None)
@given(shapes)
def test_microbatches_share_a_shape_within_the_limits(case):
    lengths, row_tokens, rows, replicas = case
    samples = [make_sample(length, key) for key, length in enumerate(lengths)]
    batches = pack(samples, row_tokens, rows, replicas)
    ((batch_rows, row_length),) = {batch.shape for batch in batches}
    assert len(batches) % replicas == 0
    assert batch_rows <= rows
    assert row_length % 16 == 0
    used = [int((batch.segment[row] >= 0).sum()) for batch in batches for row in range(batch_rows)]
    assert max(used) <= row_tokens
    assert row_length - max(used) < 16, "rows are longer than the longest needs"
    num_rows = sum(count > 0 for count in used)
    needed = math.ceil(num_rows / rows)
    assert len(batches) == math.ceil(needed / replicas) * replicas


def test_segments_count_up_from_left_to_right():
    samples = [make_sample(length, length) for length in (3, 9, 4, 6, 2, 8)]
    for batch in pack(samples, row_tokens=16, rows_per_microbatch=4, num_replicas=1):
        for segment in batch.segment:
            used = segment[segment >= 0]
            assert (segment[: len(used)] == used).all(), "padding stands between samples"
            assert used[0] == 0
            assert set(np.diff(used)) <= {0, 1}


def test_padding_carries_neither_tokens_nor_loss():
    batches = pack([make_sample(5, 0)], row_tokens=64, rows_per_microbatch=4, num_replicas=3)
    assert len(batches) == 3
    for batch in batches:
        padding = batch.segment < 0
        assert (batch.labels[padding] == -1).all()
        assert (batch.token_ids[padding] == 0).all()
    assert [batch.num_tokens for batch in batches] == [5, 0, 0]


def test_equal_samples_pack_equally():
    samples = [make_sample(1 + key % 7, key) for key in range(40)]
    first, second = (pack(samples, 16, 3, 2) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.labels, b.labels)


def test_first_fit_decreasing_fills_the_hand_computed_rows():
    # Decreasing: 7 5 4 3 1 into rows of 8: [7 1] [5 3] [4].
    row, offset = first_fit_decreasing(np.array([4, 5, 3, 7, 1]), 8)
    assert row.tolist() == [2, 1, 1, 0, 0]
    assert offset.tolist() == [0, 0, 5, 0, 7]


def test_a_sample_longer_than_a_row_is_refused_by_length():
    samples = [make_sample(length, length) for length in (10, 33, 20, 40)]
    with pytest.raises(InputError, match=r"row of 32 tokens; found 2 longer, of 33, 40 tokens"):
        pack(samples, row_tokens=32, rows_per_microbatch=2, num_replicas=1)


def test_nothing_to_pack_is_refused():
    with pytest.raises(InputError, match="there are none"):
        pack([], row_tokens=32, rows_per_microbatch=2, num_replicas=1)


def test_a_learnt_token_without_predecessor_is_a_bug():
    sample = make_sample(8, 0)
    mask = np.ones(8, dtype=bool)
    broken = TrainingSample(
        token_ids=sample.token_ids,
        position_ids=sample.position_ids,
        block=sample.block,
        branch=sample.branch,
        predecessor=sample.predecessor,
        loss_mask=mask,
    )
    with pytest.raises(AssertionError, match="no predecessor"):
        pack([broken], row_tokens=32, rows_per_microbatch=2, num_replicas=1)
