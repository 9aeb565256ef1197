"""The decode step in fixed memory: padding changes nothing, and no live slot changes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from npr_megatron.config.engine import EngineConfig
from npr_megatron.engine.compute.attention import PooledAttention
from npr_megatron.engine.compute.decode_rows import (
    Bucket,
    BucketLimits,
    decode_rows,
    round_up_keys,
    round_up_rows,
)
from npr_megatron.engine.compute.device_batch import to_device
from npr_megatron.engine.compute.model import EngineModel
from npr_megatron.engine.compute.runner import LocalRunner
from npr_megatron.engine.compute.static_decode import GatherReader, StaticDecode
from npr_megatron.engine.compute.transfer import Upload
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.memory.pool import SlotArray, SlotPool
from npr_megatron.engine.schedule.batch import Batch, assemble
from npr_megatron.records.trajectory import FloatArray, RouteArray, Trajectory
from tests.batches import (
    decode_batch,
    feed_on,
    grown_rows,
    rows_of_lengths,
    scatter_cache,
    stream_on,
)
from tests.engines import TINY, drain, random_weights, request_for, teacher_of
from tests.structures import SMALL, random_structure

LIMITS = BucketLimits(max_rows=32, max_reads=32 * 512)
NUM_SLOTS = 8192
SPARE = NUM_SLOTS + 1


def model_with(seed: int) -> EngineModel:
    """A model with random weights and a cache full of random keys and values, in float64: what is
    left between two orders of summation is the rounding of logits to fp32.
    """
    model = EngineModel(
        TINY, num_slots=NUM_SLOTS + 1, dtype=torch.float64, device=torch.device("cpu")
    )
    for name, weight in random_weights(TINY, seed).items():
        model.weights[name].copy_(weight)
    scatter_cache(model, seed)
    return model


def copy_of(model: EngineModel) -> EngineModel:
    """Another model with the same weights and the same cache."""
    other = model_with(0)
    for name, weight in model.weights.items():
        other.weights[name].copy_(weight)
    for cache, source in zip(other.kv_cache, model.kv_cache, strict=True):
        cache.copy_(source)
    return other


def ragged(model: EngineModel, batch: Batch) -> torch.Tensor:
    """What the runner of a CPU does."""
    placed = to_device(batch, Upload(model.device))
    attend = PooledAttention(model.kv_cache, placed.slots, placed.groups)
    hidden = model.hidden(placed.token_ids, placed.position_ids, attend)
    return model.logits(hidden.index_select(0, placed.logit_index))


def static_decode(model: EngineModel, limits: BucketLimits = LIMITS) -> StaticDecode:
    return StaticDecode(model, GatherReader(model.kv_cache, limits))


def run(static: StaticDecode, batch: Batch) -> torch.Tensor | None:
    rows = decode_rows(batch)
    assert rows is not None
    return static.run(rows)


@pytest.mark.parametrize("seed", range(8))
def test_a_padded_step_equals_the_ragged_one(seed: int):
    rng = np.random.default_rng(seed)
    model = model_with(seed)
    other, pool = copy_of(model), SlotPool(NUM_SLOTS)
    rows, static = grown_rows(rng, pool, longest=200), static_decode(model)
    for _ in range(4):
        batch = decode_batch(rng, pool, rows, model)
        torch.testing.assert_close(run(static, batch), ragged(other, batch), atol=1e-6, rtol=1e-6)
    # Same keys and values were written, and nothing else but the spare slot.
    for cache, expected in zip(model.kv_cache, other.kv_cache, strict=True):
        torch.testing.assert_close(cache[:-1], expected[:-1], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "lengths",
    [[0], [127], [126, 127, 128], [0] * 9, [255, 254, 1], [10] * 16, [10] * 17, [511, 5]],
    ids=str,
)
def test_a_padded_step_equals_the_ragged_one_at_the_edges_of_buckets(lengths: list[int]):
    rng = np.random.default_rng(0)
    model, pool = model_with(1), SlotPool(NUM_SLOTS)
    other = copy_of(model)
    batch = decode_batch(rng, pool, rows_of_lengths(pool, lengths), model)
    logprobs = run(static_decode(model), batch)
    torch.testing.assert_close(logprobs, ragged(other, batch), atol=1e-6, rtol=1e-6)


def test_the_comparison_sees_one_key_too_few_and_one_of_another_row():
    rng = np.random.default_rng(0)
    model, pool = model_with(1), SlotPool(NUM_SLOTS)
    other, static = copy_of(model), static_decode(model)
    batch = decode_batch(rng, pool, rows_of_lengths(pool, [30, 30, 9]), model)
    expected, rows = ragged(other, batch), decode_rows(batch)
    assert rows is not None
    (table,) = rows.blocks
    foreign = table.copy()
    foreign[0, 3] = table[1, 3]
    for wrong in (replace(rows, lengths=rows.lengths - 1), replace(rows, blocks=[foreign])):
        assert (static.run(wrong) - expected).abs().max() > 1e-3
    torch.testing.assert_close(static.run(rows), expected, atol=1e-6, rtol=1e-6)


def test_padded_rows_change_no_live_slot():
    rng = np.random.default_rng(2)
    model, pool = model_with(2), SlotPool(NUM_SLOTS)
    batch = decode_batch(rng, pool, rows_of_lengths(pool, [5, 9, 30]), model)
    before = [cache.clone() for cache in model.kv_cache]
    run(static_decode(model), batch)
    for cache, old in zip(model.kv_cache, before, strict=True):
        changed = (cache != old).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
        assert changed == sorted([*batch.slots.tolist(), SPARE])


def test_a_step_of_padding_only_changes_the_spare_slot_only():
    model = model_with(3)
    static, before = static_decode(model), [cache.clone() for cache in model.kv_cache]
    bucket = Bucket(4, 128)
    static.load_padding(bucket)
    static.forward(bucket)
    for cache, old in zip(model.kv_cache, before, strict=True):
        assert (cache != old).flatten(1).any(dim=1).nonzero()[:, 0].tolist() == [SPARE]


def test_results_do_not_depend_on_what_an_earlier_larger_step_left_behind():
    rng = np.random.default_rng(4)
    model, pool = model_with(4), SlotPool(NUM_SLOTS)
    static = static_decode(model)
    run(static, decode_batch(rng, pool, rows_of_lengths(pool, [300] * 20), model))
    batch = decode_batch(rng, pool, rows_of_lengths(pool, [7, 120]), model)
    again, fresh = copy_of(model), copy_of(model)
    left = run(static_decode(again), batch)
    assert torch.equal(run(static, batch), left)
    torch.testing.assert_close(left, ragged(fresh, batch), atol=1e-6, rtol=1e-6)


def test_memory_is_fixed_and_results_are_copies():
    rng = np.random.default_rng(5)
    model, pool = model_with(5), SlotPool(NUM_SLOTS)
    static = static_decode(model)
    buffers = {name: value.data_ptr() for name, value in vars(static).items() if is_tensor(value)}
    assert len(buffers) >= 3
    rows = grown_rows(rng, pool, longest=100)
    first = run(static, decode_batch(rng, pool, rows, model))
    kept = first.clone()
    for _ in range(3):
        run(static, decode_batch(rng, pool, rows, model))
    assert torch.equal(first, kept)
    after = {name: value.data_ptr() for name, value in vars(static).items() if is_tensor(value)}
    assert after == buffers


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def test_broken_weights_leave_nothing_behind_in_what_padding_reads():
    rng = np.random.default_rng(9)
    model, pool = model_with(9), SlotPool(NUM_SLOTS)
    healthy = copy_of(model)
    static, rows = static_decode(model), rows_of_lengths(pool, [40, 3, 7])
    model.weights["embed_tokens.weight"].fill_(torch.nan)
    assert run(static, decode_batch(rng, pool, rows, model)).isnan().all()
    model.weights["embed_tokens.weight"].copy_(healthy.weights["embed_tokens.weight"])
    batch = decode_batch(rng, pool, rows_of_lengths(pool, [50, 2, 8]), model)
    torch.testing.assert_close(run(static, batch), ragged(healthy, batch), atol=1e-6, rtol=1e-6)


def test_new_weights_in_place_are_seen_without_any_change_to_the_step():
    rng = np.random.default_rng(6)
    model, pool = model_with(6), SlotPool(NUM_SLOTS)
    static, rows = static_decode(model), grown_rows(rng, pool, longest=100)
    run(static, decode_batch(rng, pool, rows, model))
    for name, weight in random_weights(TINY, 77).items():
        model.weights[name].copy_(weight)
    batch = decode_batch(rng, pool, rows, model)
    other = copy_of(model)
    torch.testing.assert_close(run(static, batch), ragged(other, batch), atol=1e-6, rtol=1e-6)


def test_slots_read_through_a_mask_with_holes_come_to_the_front():
    rng = np.random.default_rng(7)
    model, pool = model_with(7), SlotPool(NUM_SLOTS)
    batch = decode_batch(rng, pool, rows_of_lengths(pool, [9, 6]), model)
    (group,) = batch.groups
    visible = np.ones((2, 1, 10), np.bool_) if group.visible is None else group.visible.copy()
    visible[:, :, [0, 3]] = False
    holed = type(batch)(
        **{name: getattr(batch, name) for name in batch.__slots__ if name != "groups"},
        groups=[type(group)(start=0, count=2, keys=group.keys, visible=visible)],
    )
    other = copy_of(model)
    torch.testing.assert_close(
        run(static_decode(model), holed), ragged(other, holed), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("seed", range(4))
def test_short_runs_among_single_tokens_are_rows_of_their_own(seed: int):
    rng = np.random.default_rng(seed)
    model, pool = model_with(seed), SlotPool(NUM_SLOTS)
    rows = rows_of_lengths(pool, rng.integers(1, 200, size=9).tolist())
    streams = [stream_on(row, 20 + row, 7 * row) for row in rows[:5]]
    runs = [feed_on(rng, pool, row, int(rng.integers(1, 6))) for row in rows[5:]]
    batch = assemble(streams, runs, pool)[0]
    assert len(batch.token_ids) > len(rows)
    assert len(batch.logit_index) < len(batch.token_ids)
    other = copy_of(model)
    torch.testing.assert_close(
        run(static_decode(model), batch), ragged(other, batch), atol=1e-6, rtol=1e-6
    )
    for cache, expected in zip(model.kv_cache, other.kv_cache, strict=True):
        torch.testing.assert_close(cache[:-1], expected[:-1], atol=1e-10, rtol=1e-10)


def test_batches_with_longer_runs_and_batches_beyond_the_limits_are_left_to_others():
    rng = np.random.default_rng(8)
    model, pool = model_with(8), SlotPool(NUM_SLOTS)
    rows = rows_of_lengths(pool, [20, 20])
    feeds = assemble([], [feed_on(rng, pool, rows[0], 17)], pool)[0]
    assert decode_rows(feeds) is None
    assert run(static_decode(model, BucketLimits(1, 1024)), _step(rng, pool, rows, model)) is None
    assert run(static_decode(model, BucketLimits(8, 255)), _step(rng, pool, rows, model)) is None
    assert (
        run(static_decode(model, BucketLimits(8, 256)), _step(rng, pool, rows, model)) is not None
    )


def _step(rng: np.random.Generator, pool: SlotPool, rows: list[int], model: EngineModel) -> Batch:
    return decode_batch(rng, pool, rows, model)


def test_row_counts_are_rounded_up():
    counts = [1, 2, 3, 5, 8, 9, 16, 17, 25, 32, 33, 64, 65, 128, 129, 500, 512]
    rounded = [1, 2, 4, 8, 8, 16, 16, 24, 32, 32, 40, 64, 80, 128, 160, 512, 512]
    assert [round_up_rows(count) for count in counts] == rounded


def test_lengths_are_rounded_up():
    lengths = [1, 128, 129, 1000, 1024, 1025, 2048, 2049, 8000]
    rounded = [128, 128, 256, 1024, 1024, 1280, 2048, 2560, 8192]
    assert [round_up_keys(length) for length in lengths] == rounded


def test_rounding_wastes_at_most_a_quarter_of_what_is_large():
    for value in range(1, 5000):
        assert value <= round_up_rows(value) < max(2 * min(value, 8), 1.25 * value + 8)
        assert value <= round_up_keys(value) < max(value + 128, 1.25 * value + 1)
        assert round_up_rows(round_up_rows(value)) == round_up_rows(value)
        assert round_up_keys(round_up_keys(value)) == round_up_keys(value)


class BothWays:
    """A runner that computes every batch it can twice, over two caches, and compares."""

    def __init__(self, config: EngineConfig) -> None:
        self._local = LocalRunner(TINY, config)
        self.weights, self.device = self._local.weights, self._local.device
        self._model = EngineModel(
            TINY, num_slots=config.num_kv_slots + 1, dtype=torch.float32, device=self.device
        )
        self._static = static_decode(self._model)
        self.num_static = self.num_ragged = self.num_mixed = 0

    def run(self, batch: Batch) -> torch.Tensor:
        for name, weight in self.weights.items():
            self._model.weights[name].copy_(weight)
        expected, rows = self._local.run(batch), decode_rows(batch)
        logits = None if rows is None else self._static.run(rows)
        if logits is None:
            self.num_ragged += 1
            logits = ragged(self._model, batch)
        else:
            self.num_static += 1
            self.num_mixed += len(batch.logit_index) < len(batch.token_ids)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        return expected

    def routes(self, slots: SlotArray) -> RouteArray | None:
        return self._local.routes(slots)

    def score(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        return self._local.score(trajectories)

    def agree(self, version: int) -> None:
        self._local.agree(version)


def test_an_engine_could_run_nearly_every_step_in_fixed_memory():
    config = EngineConfig(num_kv_slots=4096, max_streams=24, kv_after_push="recompute")
    runner = BothWays(config)
    engine = EmbeddedEngine(TINY, config, SMALL, runner=runner)
    engine.load(random_weights(TINY, 0))
    rng = random.Random(0)
    for rollout in range(8):
        structure = random_structure(rng, (20, 21, 22 + rollout % 2), SMALL, num_blocks=(2, 3))
        teacher = teacher_of(structure.token_ids, structure.prompt_length, SMALL)
        engine.add(request_for(structure.prompt_ids, rollout=rollout), teacher)
    for _ in range(12):
        engine.step()
    engine.load(random_weights(TINY, 1), version=1)
    assert len(drain(engine)) == 8
    assert runner.num_static > 10 * runner.num_ragged
    assert runner.num_mixed > 5  # forced runs among single tokens
