"""Attention over the pool, level by level, against a softmax written out per token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from npr_megatron.engine.compute.attention import (
    DenseAttention,
    PooledAttention,
    split_heads,
)
from npr_megatron.engine.compute.device_batch import to_device
from npr_megatron.engine.compute.host_attention import HostAttention
from npr_megatron.engine.compute.transfer import Upload
from npr_megatron.engine.compute.two_level import (
    attend_two_levels,
    attend_with_lse,
    matmul_with_lse,
)
from npr_megatron.engine.schedule.batch import Batch, assemble
from tests.ragged import RaggedRows, random_rows
from tests.structures import QUICK

_CPU = torch.device("cpu")
_NUM_Q, _NUM_KV, _HEAD = 4, 2, 8


class _Inputs:
    """Random queries, keys and values of a batch, and the cache it writes to."""

    def __init__(self, batch: Batch, num_slots: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_tokens = len(batch.token_ids)
        self.heads = torch.randn(num_tokens, _NUM_Q + 2 * _NUM_KV, _HEAD, generator=generator)
        self.cache = torch.randn(num_slots + 1, 2 * _NUM_KV, _HEAD, generator=generator)

    def by_copies(self, batch: Batch) -> Tensor:
        placed = to_device(batch, Upload(_CPU))
        return PooledAttention([self.cache.clone()], placed.slots, placed.groups)(0, self.heads)

    def in_place(self, batch: Batch) -> Tensor:
        return HostAttention([self.cache.clone()], batch)(0, self.heads)

    def expected(self, batch: Batch, reads: list[list[int]]) -> Tensor:
        cache = self.cache.clone()
        queries, cache[torch.from_numpy(batch.slots)] = split_heads(self.heads, 2 * _NUM_KV)
        longest = max(len(slots) for slots in reads)
        padded_TL = torch.tensor([slots + [0] * (longest - len(slots)) for slots in reads])
        lengths = torch.tensor([len(slots) for slots in reads])
        return _attend(queries, cache[padded_TL], lengths)


def _attend(queries_TND: Tensor, read_TLKD: Tensor, lengths_T: Tensor) -> Tensor:
    """Return [T, N * D]: each query over the first of its keys and values, in float64."""
    repeated = read_TLKD.double().repeat_interleave(_NUM_Q // _NUM_KV, dim=2)
    keys, values = repeated.chunk(2, dim=2)
    scores = torch.einsum("tnd,tlnd->tnl", queries_TND.double(), keys) / _HEAD**0.5
    hidden = torch.arange(keys.shape[1]) >= lengths_T[:, None]
    probs = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    return torch.einsum("tnl,tlnd->tnd", probs, values).flatten(1).float()


@QUICK
@given(seed=st.integers(0, 10_000))
def test_every_token_attends_to_exactly_what_it_reads(seed: int) -> None:
    rows = random_rows(seed)
    batch, _, _ = assemble(rows.streams, rows.feeds, rows.pool)
    inputs = _Inputs(batch, rows.pool.num_slots, seed)
    expected = inputs.expected(batch, rows.reads_of(batch))
    torch.testing.assert_close(inputs.by_copies(batch), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(inputs.in_place(batch), expected, rtol=0, atol=1e-6)


def _family(prompt_tokens: int = 400) -> tuple[RaggedRows, Batch]:
    """Sixteen rollouts of one prompt: long enough to be read once for all."""
    rows = RaggedRows(np.random.default_rng(0))
    prompt = rows.open(None, prompt_tokens)
    for index in range(16):
        rows.decode(rows.open(prompt, index % 5))
    batch, _, _ = assemble(rows.streams, [], rows.pool)
    return rows, batch


def test_a_shared_beginning_is_read_once_and_changes_nothing() -> None:
    rows, batch = _family()
    assert [group.num_shared for group in batch.groups] == [400]
    inputs = _Inputs(batch, rows.pool.num_slots, seed=1)
    plain = dataclasses.replace(
        batch, groups=[dataclasses.replace(group, num_shared=0) for group in batch.groups]
    )
    expected = inputs.expected(batch, rows.reads_of(batch))
    for attention in (inputs.by_copies, inputs.in_place):
        torch.testing.assert_close(attention(batch), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(attention(plain), expected, rtol=0, atol=1e-6)


def test_threads_share_the_rows_out_and_change_nothing() -> None:
    rows, batch = _family(1200)
    inputs = _Inputs(batch, rows.pool.num_slots, seed=2)
    plain = dataclasses.replace(
        batch, groups=[dataclasses.replace(group, num_shared=0) for group in batch.groups]
    )
    before = torch.get_num_threads()
    alone = inputs.in_place(plain)
    try:
        torch.set_num_threads(3)
        assert len(vars(HostAttention([inputs.cache], plain))["_rows"]) == 3
        shared_out = inputs.in_place(plain)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(shared_out, alone)


def test_control_a_beginning_one_slot_too_long_is_seen() -> None:
    rows, batch = _family()
    inputs = _Inputs(batch, rows.pool.num_slots, seed=1)
    groups = [dataclasses.replace(group, num_shared=401) for group in batch.groups]
    wrong = dataclasses.replace(batch, groups=groups)
    expected = inputs.expected(batch, rows.reads_of(batch))
    for attention in (inputs.by_copies, inputs.in_place):
        assert float((attention(wrong) - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_two_levels_equal_one_softmax_over_both(scale: float) -> None:
    """Also where one level outweighs the other by far (``scale`` 30)."""
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(5, _NUM_KV, 2, _HEAD, generator=generator)
    shared = torch.randn(33, 2 * _NUM_KV, _HEAD, generator=generator)
    own = torch.randn(5, 9, 2 * _NUM_KV, _HEAD, generator=generator)
    shared[:, :_NUM_KV] *= scale
    lengths = torch.tensor([1, 9, 4, 2, 9])
    hidden = torch.arange(9) >= lengths[:, None]
    bias = torch.zeros(5, 9).masked_fill_(hidden, -torch.inf)[:, None, None]
    out = attend_two_levels(queries, shared, own, bias)
    read = torch.cat((shared.expand(5, -1, -1, -1), own), dim=1)
    expected = _attend(queries.reshape(5, _NUM_Q, _HEAD), read, 33 + lengths)
    torch.testing.assert_close(out.reshape(5, -1), expected, rtol=0, atol=2e-6)


def test_two_levels_keep_bf16_as_one_softmax_does() -> None:
    generator = torch.Generator().manual_seed(6)
    queries = torch.randn(4, _NUM_KV, 2, _HEAD, generator=generator).bfloat16()
    shared = torch.randn(40, 2 * _NUM_KV, _HEAD, generator=generator).bfloat16()
    own = torch.randn(4, 5, 2 * _NUM_KV, _HEAD, generator=generator).bfloat16()
    out = attend_two_levels(queries, shared, own, None)
    read = torch.cat((shared.expand(4, -1, -1, -1), own), dim=1)
    expected = _attend(queries.reshape(4, _NUM_Q, _HEAD), read, torch.full((4,), 45))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.reshape(4, -1).float(), expected, rtol=0, atol=2e-2)


def test_both_ways_to_the_sum_of_exponentials_agree() -> None:
    generator = torch.Generator().manual_seed(4)
    queries, keys, values = (
        torch.randn(3, _NUM_KV, size, _HEAD, generator=generator) for size in (2, 7, 7)
    )
    bias = torch.zeros(3, 1, 1, 7)
    bias[1, ..., 3:] = -torch.inf
    for hidden in (None, bias):
        for ours, theirs in zip(
            matmul_with_lse(queries, keys, values, hidden),
            attend_with_lse(queries, keys, values, hidden),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_dense_attention_equals_the_softmax_per_token() -> None:
    generator = torch.Generator().manual_seed(5)
    num_rows, length = 3, 7
    heads = torch.randn(num_rows * length, _NUM_Q + 2 * _NUM_KV, _HEAD, generator=generator)
    queries, keys_values = split_heads(heads, 2 * _NUM_KV)
    visible = torch.rand(num_rows, 1, length, length, generator=generator) < 0.5
    visible |= torch.eye(length, dtype=torch.bool)
    out = DenseAttention(visible, _NUM_KV)(0, heads)
    for token in range(num_rows * length):
        row, query = divmod(token, length)
        read = keys_values.reshape(num_rows, length, -1, _HEAD)[row, visible[row, 0, query]]
        expected = _attend(queries[token, None], read[None], torch.tensor([len(read)]))
        torch.testing.assert_close(out[token, None], expected, rtol=0, atol=1e-6)
