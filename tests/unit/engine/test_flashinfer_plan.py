"""Index arrays of paged attention, read as FlashInfer documents them, against the ragged groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from npr_megatron.engine.compute.attention import PooledAttention
from npr_megatron.engine.compute.decode_rows import decode_rows
from npr_megatron.engine.compute.device_batch import to_device
from npr_megatron.engine.compute.flashinfer import as_pages, library_for
from npr_megatron.engine.compute.model import EngineModel
from npr_megatron.engine.compute.paged_plan import PagedRows, cascade_of, indptr, paged_rows
from npr_megatron.engine.compute.transfer import Upload
from npr_megatron.engine.memory.pool import SlotPool
from npr_megatron.engine.schedule.batch import Batch, assemble
from npr_megatron.engine.schedule.feed import Feed
from tests.batches import decode_batch, feed_on, grown_rows, rows_of_lengths, stream_on
from tests.engines import TINY

CPU = torch.device("cpu")
NUM_SLOTS = 8192
NUM_Q, NUM_KV, HEAD = TINY.num_attention_heads, TINY.num_key_value_heads, TINY.head_dim


class Layer:
    """One layer's cache with random contents, and random queries, keys and values of a batch."""

    def __init__(self, seed: int, num_tokens: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.cache = random(NUM_SLOTS + 1, 2 * NUM_KV, HEAD)
        self.queries = random(num_tokens, NUM_Q, HEAD)
        self.keys_values = random(num_tokens, 2 * NUM_KV, HEAD)

    def pooled(self, batch: Batch) -> torch.Tensor:
        """What the ragged groups give, [T, N, D]; writes the batch into the cache."""
        placed = to_device(batch, Upload(CPU))
        attend = PooledAttention([self.cache], placed.slots, placed.groups)
        return attend(0, self.queries, self.keys_values).view(-1, NUM_Q, HEAD)

    def paged(self, rows: PagedRows) -> tuple[torch.Tensor, torch.Tensor]:
        """What a paged kernel makes of ``rows``: results [Q, N, D] and log-sum-exps [Q, N]."""
        results, sums, mask_start = [], [], 0
        pages = as_pages(self.cache)
        for row in range(len(rows.query_indptr) - 1):
            tokens = rows.tokens[rows.query_indptr[row] : rows.query_indptr[row + 1]]
            slots = rows.key_slots[rows.key_indptr[row] : rows.key_indptr[row + 1]]
            num_queries, num_keys = len(tokens), len(slots)
            if rows.mask is None:
                ends = np.arange(num_keys - num_queries, num_keys)
                mask = np.arange(num_keys) <= ends[:, None]
            else:
                size = num_queries * num_keys
                mask = rows.mask[mask_start : mask_start + size].reshape(num_queries, num_keys)
                mask_start += size
            keys, values = pages[torch.from_numpy(slots).long()][:, :, 0].unbind(1)
            keys = keys.repeat_interleave(NUM_Q // NUM_KV, dim=1)
            values = values.repeat_interleave(NUM_Q // NUM_KV, dim=1)
            scores = torch.einsum("qnd,knd->qnk", self.queries[tokens], keys) * HEAD**-0.5
            scores.masked_fill_(~torch.from_numpy(mask)[:, None], -torch.inf)
            results.append(torch.einsum("qnk,knd->qnd", scores.softmax(-1), values))
            sums.append(scores.logsumexp(-1))
        assert rows.mask is None or mask_start == len(rows.mask)
        return torch.cat(results), torch.cat(sums)


def random_batch(seed: int) -> tuple[Batch, SlotPool]:
    """Streams of grown trees, prompts, forced runs and a replayed tree."""
    rng = np.random.default_rng(seed)
    pool = SlotPool(NUM_SLOTS)
    streams = [stream_on(row, 20, 3) for row in grown_rows(rng, pool, longest=120)]
    feeds = [
        feed_on(rng, pool, row, int(rng.integers(1, 40)))
        for row in rows_of_lengths(pool, rng.integers(0, 60, size=5).tolist())
    ]
    feeds += [replayed(rng, pool, num_shared) for num_shared in (0, 7)]
    return assemble(streams, feeds, pool)[0], pool


def replayed(rng: np.random.Generator, pool: SlotPool, num_shared: int) -> Feed:
    """A tree of two branches behind ``num_shared`` tokens in the pool."""
    block = np.array([0] * 10 + [1] * 9 + [0] * 3, np.int32)
    branch = np.array([0] * 10 + [1] * 4 + [2] * 5 + [0] * 3, np.int32)
    row = pool.open_row(None, len(block))
    slots = pool.append(row, len(block))
    tokens = rng.integers(20, 40, size=len(block)).astype(np.int32)
    labels = {"token_ids": tokens, "position_ids": tokens, "block": block, "branch": branch}
    return Feed.of_tree(labels, slots, num_shared)


@pytest.mark.parametrize("seed", range(6))
def test_rows_cover_a_batch_and_read_what_its_groups_read(seed: int):
    batch, _ = random_batch(seed)
    layer = Layer(seed, len(batch.token_ids))
    expected = layer.pooled(batch)
    causal, masked = paged_rows(batch)
    assert causal is not None
    assert masked is not None
    covered = np.concatenate([causal.tokens, masked.tokens])
    assert sorted(covered.tolist()) == list(range(len(batch.token_ids)))
    for rows in (causal, masked):
        torch.testing.assert_close(layer.paged(rows)[0], expected[rows.tokens])


def test_only_replays_of_trees_need_a_mask():
    causal, masked = paged_rows(random_batch(0)[0])
    assert causal is not None
    assert masked is not None
    assert causal.mask is None
    assert sorted(np.diff(masked.query_indptr).tolist()) == [15, 22]
    pool = SlotPool(64)
    run = feed_on(np.random.default_rng(0), pool, pool.open_row(None, 5), 5)
    assert paged_rows(assemble([], [run], pool)[0])[1] is None


def test_the_comparison_sees_a_missing_mask_and_a_wrong_slot():
    batch, _ = random_batch(1)
    layer = Layer(1, len(batch.token_ids))
    expected = layer.pooled(batch)
    _, masked = paged_rows(batch)
    assert masked is not None
    unmasked = PagedRows(masked.tokens, masked.query_indptr, masked.key_indptr, masked.key_slots)
    slots = masked.key_slots.copy()
    slots[0] = 4000
    moved = PagedRows(masked.tokens, masked.query_indptr, masked.key_indptr, slots, masked.mask)
    for wrong in (unmasked, moved):
        assert (layer.paged(wrong)[0] - expected[masked.tokens]).abs().max() > 1e-3


def shared_batch(prompt_length: int) -> tuple[Batch, SlotPool]:
    """Two families behind prompts of this length, and rows that share with nobody."""
    rng = np.random.default_rng(3)
    pool = SlotPool(NUM_SLOTS)
    rows = rows_of_lengths(pool, [1, 40])
    for num_rollouts in (4, 3):
        prompt = pool.open_row(None, prompt_length)
        pool.append(prompt, prompt_length)
        for _ in range(num_rollouts):
            rows.append(pool.open_row(prompt, prompt_length + 60))
            pool.append(rows[-1], int(rng.integers(1, 50)))
    model = EngineModel(TINY, num_slots=1, dtype=torch.float32, device=CPU)
    return decode_batch(rng, pool, rows, model), pool


def test_two_levels_give_what_the_groups_give():
    batch, _ = shared_batch(1500)
    layer = Layer(2, len(batch.token_ids))
    expected = layer.pooled(batch)
    rows = decode_rows(batch)
    assert rows is not None
    cascade = cascade_of(rows)
    assert cascade is not None
    assert cascade.num_saved == 3 * 1500 + 2 * 1500
    np.testing.assert_array_equal(cascade.shared.tokens, cascade.own.tokens)
    assert (np.diff(cascade.shared.key_indptr) > 0).all()
    assert (np.diff(cascade.own.key_indptr) > 0).all()
    # The upper level is not causal: every query sees the whole beginning.
    queries, keys = np.diff(cascade.shared.query_indptr), np.diff(cascade.shared.key_indptr)
    whole = PagedRows(
        cascade.shared.tokens,
        cascade.shared.query_indptr,
        cascade.shared.key_indptr,
        cascade.shared.key_slots,
        np.ones(int((queries * keys).sum()), np.bool_),
    )
    shared, shared_sum = layer.paged(whole)
    own, own_sum = layer.paged(cascade.own)
    weight = torch.sigmoid(shared_sum - own_sum)[..., None]
    merged = weight * shared + (1 - weight) * own
    torch.testing.assert_close(merged, expected[cascade.own.tokens])


def test_short_beginnings_are_read_by_every_row():
    rows = decode_rows(shared_batch(600)[0])
    assert rows is not None
    assert cascade_of(rows) is None


def test_flat_slots_are_the_rows_of_the_pool_one_after_another():
    pool = SlotPool(NUM_SLOTS)
    opened = rows_of_lengths(pool, [3, 90, 17, 200])
    batch = assemble([stream_on(row, 20, row) for row in opened], [], pool)[0]
    rows = decode_rows(batch)
    assert rows is not None
    starts = indptr(rows.lengths)
    for index in range(4):
        row = int(batch.position_ids[index])  # the position names the row here
        flat = rows.flat_slots()[starts[index] : starts[index + 1]]
        assert flat.tolist() == pool.read(row).tolist()


def test_a_cache_is_the_library_s_combined_cache_seen_otherwise():
    cache = torch.arange(5 * 2 * NUM_KV * HEAD).view(5, 2 * NUM_KV, HEAD)
    pages = as_pages(cache)
    assert pages.shape == (5, 2, 1, NUM_KV, HEAD)
    assert pages.data_ptr() == cache.data_ptr()
    keys, values = pages.unbind(1)
    assert torch.equal(keys[:, 0], cache[:, :NUM_KV])
    assert torch.equal(values[:, 0], cache[:, NUM_KV:])
    assert keys.stride() == values.stride()


def test_without_a_gpu_nothing_is_imported():
    model = EngineModel(TINY, num_slots=4, dtype=torch.bfloat16, device=CPU)
    assert library_for(model) is None
