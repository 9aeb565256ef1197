"""Batches as paged attention takes them, and all that surrounds FlashInfer but its kernels: run
against a plain reading of its documentation (``tests.paged_library``), compared with ragged groups.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.compute import flashinfer
from npr_megatron.engine.compute.attention import PooledAttention
from npr_megatron.engine.compute.decode_rows import Bucket, BucketLimits, decode_rows
from npr_megatron.engine.compute.device_batch import to_device
from npr_megatron.engine.compute.flashinfer import (
    FlashInferBatches,
    FlashInferReader,
    as_pages,
    library_for,
)
from npr_megatron.engine.compute.model import EngineModel
from npr_megatron.engine.compute.paged_plan import cascade_of, indptr, paged_rows
from npr_megatron.engine.compute.static_decode import StaticDecode
from npr_megatron.engine.compute.transfer import Upload
from npr_megatron.engine.memory.pool import SlotPool
from npr_megatron.engine.schedule.batch import Batch, assemble
from tests import paged_library
from tests.batches import (
    decode_batch,
    feed_on,
    grown_rows,
    replayed,
    rows_of_lengths,
    scatter_cache,
    stream_on,
)
from tests.engines import TINY, random_weights

NUM_SLOTS = 8192
LIMITS = BucketLimits(max_rows=32, max_reads=1 << 16)


def model_with(seed: int, config: ModelConfig = TINY) -> EngineModel:
    """Random weights, a cache full of random keys and values, and a spare slot; float64."""
    model = EngineModel(
        config, num_slots=NUM_SLOTS + 1, dtype=torch.float64, device=torch.device("cpu")
    )
    for name, weight in random_weights(config, seed).items():
        model.weights[name].copy_(weight)
    scatter_cache(model, seed)
    return model


def random_batch(seed: int) -> Batch:
    """Streams of grown trees, prompts, forced runs and replayed trees."""
    rng, pool = np.random.default_rng(seed), SlotPool(NUM_SLOTS)
    streams = [stream_on(row, 20, 3) for row in grown_rows(rng, pool, longest=120)]
    rows = rows_of_lengths(pool, rng.integers(0, 60, size=5).tolist())
    feeds = [feed_on(rng, pool, row, int(rng.integers(1, 40))) for row in rows]
    feeds += [replayed(rng, pool, 0), replayed(rng, pool, 7)]
    return assemble(streams, feeds, pool)[0]


def shared_batch(prompt_length: int, num_rollouts: tuple[int, int] = (4, 3)) -> Batch:
    """Two families behind prompts of this length, and rows that share with nobody."""
    rng, pool = np.random.default_rng(3), SlotPool(NUM_SLOTS)
    rows = rows_of_lengths(pool, [1, 40])
    for num_rows in num_rollouts:
        prompt = pool.open_row(None, prompt_length)
        pool.append(prompt, prompt_length)
        for _ in range(num_rows):
            rows.append(pool.open_row(prompt, prompt_length + 60))
            pool.append(rows[-1], int(rng.integers(1, 50)))
    return decode_batch(rng, pool, rows, model_with(0))


def both(batch: Batch, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, FlashInferBatches]:
    """One layer's result by the paged library and by the ragged groups."""
    model, upload = model_with(seed), Upload(torch.device("cpu"))
    batches = FlashInferBatches(paged_library, model)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(batch.token_ids), model.num_q + 2 * model.num_kv, TINY.head_dim)
    heads = torch.randn(shape, generator=generator, dtype=torch.float64)
    paged = batches.place(batch, upload).attend(0, heads)
    placed = to_device(batch, upload)
    pooled = PooledAttention(model.kv_cache, placed.slots, placed.groups)
    return paged, pooled(0, heads), batches


@pytest.mark.parametrize("seed", range(6))
def test_a_batch_of_anything_is_attended_as_its_groups_are(seed: int):
    paged, pooled, _ = both(random_batch(seed), seed)
    torch.testing.assert_close(paged, pooled)


def test_only_replays_of_trees_need_a_mask():
    batch = random_batch(0)
    causal, masked = paged_rows(batch)
    assert causal is not None
    assert masked is not None
    assert causal.mask is None
    assert sorted(np.diff(masked.query_indptr).tolist()) == [15, 22]
    covered = np.concatenate([causal.tokens, masked.tokens])
    assert sorted(covered.tolist()) == list(range(len(batch.token_ids)))
    pool = SlotPool(64)
    run = feed_on(np.random.default_rng(0), pool, pool.open_row(None, 5), 5)
    assert paged_rows(assemble([], [run], pool)[0])[1] is None


def test_the_comparison_sees_a_wrong_slot_and_a_missing_mask(monkeypatch: pytest.MonkeyPatch):
    batch = random_batch(1)
    plan = paged_library.BatchPrefillWithPagedKVCacheWrapper.plan

    def blind(self, *arrays, custom_mask=None, **rest):
        plan(self, *arrays, **rest)

    def misplaced(self, starts, ends, slots, *arrays, **rest):
        plan(self, starts, ends, torch.cat((slots[1:], slots[:1])), *arrays, **rest)

    for wrong in (blind, misplaced):
        monkeypatch.setattr(paged_library.BatchPrefillWithPagedKVCacheWrapper, "plan", wrong)
        paged, pooled, _ = both(batch)
        assert (paged - pooled).abs().max() > 1e-2


def test_two_levels_give_what_the_groups_give(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flashinfer, "_CASCADE_BYTES", 1)
    batch = shared_batch(2500)
    paged, pooled, batches = both(batch)
    torch.testing.assert_close(paged, pooled)
    assert vars(batches)["_levels"].num_plans == 1
    assert vars(batches)["_causal"].num_plans == 0


def test_two_levels_share_each_beginning_once_and_leave_no_row_empty():
    rows = decode_rows(shared_batch(2500))
    assert rows is not None
    cascade = cascade_of(rows)
    assert cascade is not None
    assert cascade.num_saved == 3 * 2500 + 2 * 2500
    np.testing.assert_array_equal(cascade.shared.tokens, cascade.own.tokens)
    assert sorted(np.diff(cascade.shared.query_indptr).tolist()) == [1, 1, 3, 4]
    assert (np.diff(cascade.shared.key_indptr) > 0).all()
    assert (np.diff(cascade.own.key_indptr) > 0).all()


def test_short_beginnings_are_read_by_every_row():
    rows = decode_rows(shared_batch(700, num_rollouts=(9, 8)))
    assert rows is not None
    assert max(rows.num_shared) == 700
    assert cascade_of(rows) is None


@pytest.mark.parametrize("seed", range(4))
def test_decode_steps_are_what_ragged_groups_give(seed: int):
    rng, pool = np.random.default_rng(seed), SlotPool(NUM_SLOTS)
    model, other = model_with(seed), model_with(seed)
    static = StaticDecode(model, FlashInferReader(paged_library, model, LIMITS))
    upload, rows = Upload(model.device), grown_rows(rng, pool, longest=100)
    for num_rows in (len(rows), len(rows), max(1, len(rows) - 1)):
        batch = decode_batch(rng, pool, rows[:num_rows], model)
        found = decode_rows(batch)
        assert found is not None
        placed = to_device(batch, upload)
        attend = PooledAttention(other.kv_cache, placed.slots, placed.groups)
        hidden = other.hidden(placed.token_ids, placed.position_ids, attend)
        expected = other.logits(hidden.index_select(0, placed.logit_index))
        torch.testing.assert_close(static.run(found), expected, atol=1e-6, rtol=1e-6)
    for cache, source in zip(model.kv_cache, other.kv_cache, strict=True):
        torch.testing.assert_close(cache[:-1], source[:-1], atol=1e-10, rtol=1e-10)


def test_buckets_of_decode_steps_differ_in_rows_only(monkeypatch: pytest.MonkeyPatch):
    rng, pool, model = np.random.default_rng(0), SlotPool(NUM_SLOTS), model_with(0)
    reader = FlashInferReader(paged_library, model, LIMITS)
    found = []
    for lengths in ([5] * 9, [500] * 12, [500] * 4, [2] * 33):
        rows = decode_rows(decode_batch(rng, pool, rows_of_lengths(pool, lengths), model))
        assert rows is not None
        found.append(reader.bucket(rows))
    assert found == [Bucket(16, 0), Bucket(16, 0), Bucket(4, 0), None]
    shared = decode_rows(shared_batch(2500))
    assert shared is not None
    assert reader.bucket(shared) == Bucket(16, 0)
    monkeypatch.setattr(flashinfer, "_CASCADE_BYTES", 1)
    assert reader.bucket(shared) is None  # two levels pay


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
    num_kv, head = TINY.num_key_value_heads, TINY.head_dim
    cache = torch.arange(5 * 2 * num_kv * head).view(5, 2 * num_kv, head)
    pages = as_pages(cache)
    assert pages.shape == (5, 2, 1, num_kv, head)
    assert pages.data_ptr() == cache.data_ptr()
    keys, values = pages.unbind(1)
    assert torch.equal(keys[:, 0], cache[:, :num_kv])
    assert torch.equal(values[:, 0], cache[:, num_kv:])
    assert keys.stride() == values.stride()


def test_without_a_gpu_nothing_is_imported():
    model = EngineModel(TINY, num_slots=4, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert library_for(model) is None
