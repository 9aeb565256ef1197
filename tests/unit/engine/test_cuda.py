"""What only a GPU can show: a replay equals the eager pass and the CPU, also behind a commit, and
FlashInfer equals gathering.

Skipped elsewhere. On a GPU machine, everything of the engine at once::

    python -m pytest -q -m gpu tests/unit/engine && \
    python tools/bench_engine.py --device cuda --json
"""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.compute import flashinfer, paged_plan
from npr_megatron.engine.compute.attention import PooledAttention
from npr_megatron.engine.compute.decode_rows import Bucket, BucketLimits, decode_rows
from npr_megatron.engine.compute.device_batch import to_device
from npr_megatron.engine.compute.graphs import GraphedDecode
from npr_megatron.engine.compute.model import EngineModel
from npr_megatron.engine.compute.static_decode import GatherReader, KeyReader, StaticDecode
from npr_megatron.engine.compute.transfer import Upload
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.memory.pool import SlotPool
from npr_megatron.engine.schedule.batch import Batch, assemble
from tests.batches import decode_batch, feed_on, grown_rows, replayed, rows_of_lengths, stream_on
from tests.engines import (
    TINY,
    assert_nothing_is_left,
    drain_preempting,
    random_weights,
    request_for,
    teacher_of,
)
from tests.structures import NUM_IDS, SMALL, random_structure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LARGE_HEADS = ModelConfig(
    num_hidden_layers=2,
    hidden_size=128,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=256,
    vocab_size=NUM_IDS,
    max_position_embeddings=512,
)
NUM_SLOTS = 8192
LIMITS = BucketLimits(max_rows=32, max_reads=1 << 18)


def twins(config: ModelConfig, dtype: torch.dtype, seed: int) -> tuple[EngineModel, EngineModel]:
    """The same model with the same cache in fp32 on the CPU and in ``dtype`` on the GPU."""
    models = [
        EngineModel(config, num_slots=NUM_SLOTS + 1, dtype=kind, device=torch.device(device))
        for kind, device in ((torch.float32, "cpu"), (dtype, "cuda"))
    ]
    generator = torch.Generator().manual_seed(seed)
    for name, weight in random_weights(config, seed).items():
        for model in models:
            model.weights[name].copy_(weight)
    for layer in range(config.num_hidden_layers):
        cache = torch.randn(models[0].kv_cache[layer].shape, generator=generator)
        cache[0] = 0.0
        for model in models:
            model.kv_cache[layer].copy_(cache)
    return models[0], models[1]


@torch.inference_mode()
def ragged(model: EngineModel, batch: Batch) -> torch.Tensor:
    placed = to_device(batch, Upload(model.device))
    attend = PooledAttention(model.kv_cache, placed.slots, placed.groups)
    hidden = model.hidden(placed.token_ids, placed.position_ids, attend)
    return model.logits(hidden.index_select(0, placed.logit_index))


@torch.inference_mode()
def eager(model: EngineModel, reader: KeyReader, batch: Batch) -> torch.Tensor:
    rows = decode_rows(batch)
    assert rows is not None
    logits = StaticDecode(model, reader).run(rows)
    assert logits is not None
    return logits


def gathering_graphs(model: EngineModel) -> GraphedDecode:
    return GraphedDecode(StaticDecode(model, GatherReader(model.kv_cache, LIMITS)), model.device)


def replay(graphs: GraphedDecode, batch: Batch) -> torch.Tensor:
    rows = decode_rows(batch)
    assert rows is not None
    logits = graphs.run(rows)
    assert logits is not None
    return logits


def library() -> object:
    return pytest.importorskip("flashinfer")


@pytest.mark.parametrize("seed", range(4))
def test_a_replay_equals_the_eager_pass_bit_for_bit_and_the_cpu_within_rounding(seed: int):
    rng = np.random.default_rng(seed)
    on_cpu, on_gpu = twins(TINY, torch.float32, seed)
    reader, pool = GatherReader(on_gpu.kv_cache, LIMITS), SlotPool(NUM_SLOTS)
    graphs = GraphedDecode(StaticDecode(on_gpu, reader), on_gpu.device)
    rows = grown_rows(rng, pool, longest=200)
    for _ in range(5):
        batch = decode_batch(rng, pool, rows, on_gpu)
        logits = replay(graphs, batch)
        assert torch.equal(logits, eager(on_gpu, reader, batch))
        torch.testing.assert_close(logits.cpu(), ragged(on_cpu, batch), atol=1e-4, rtol=1e-4)
    for cache, expected in zip(on_gpu.kv_cache, on_cpu.kv_cache, strict=True):
        torch.testing.assert_close(cache[:-1].cpu(), expected[:-1], atol=1e-4, rtol=1e-4)
        assert not cache[0].any()


def test_a_commit_in_place_reaches_a_graph_that_is_captured_already():
    rng = np.random.default_rng(0)
    on_cpu, on_gpu = twins(TINY, torch.float32, 0)
    pool = SlotPool(NUM_SLOTS)
    graphs = gathering_graphs(on_gpu)
    rows = rows_of_lengths(pool, [5, 60, 17])
    old = replay(graphs, decode_batch(rng, pool, rows, on_gpu))
    for name, weight in random_weights(TINY, 1).items():
        on_cpu.weights[name].copy_(weight)
        on_gpu.weights[name].copy_(weight)
    for cache, source in zip(on_cpu.kv_cache, on_gpu.kv_cache, strict=True):
        cache.copy_(source)
    batch = decode_batch(rng, pool, rows, on_gpu)
    logits = replay(graphs, batch)
    assert graphs.num_graphs == 1
    torch.testing.assert_close(logits.cpu(), ragged(on_cpu, batch), atol=1e-4, rtol=1e-4)
    assert (logits - old).abs().max() > 0.1


def test_buckets_are_captured_once_and_keep_their_results_apart():
    rng = np.random.default_rng(1)
    on_cpu, on_gpu = twins(TINY, torch.float32, 1)
    pool = SlotPool(NUM_SLOTS)
    graphs = gathering_graphs(on_gpu)
    steps = [rows_of_lengths(pool, lengths) for lengths in ([3], [200, 5], [7] * 12)]
    for _ in range(3):
        for rows in steps:
            batch = decode_batch(rng, pool, rows, on_gpu)
            logits = replay(graphs, batch)
            torch.testing.assert_close(logits.cpu(), ragged(on_cpu, batch), atol=1e-4, rtol=1e-4)
    assert graphs.num_graphs == 3


def test_weights_may_arrive_from_another_thread_while_a_graph_is_captured():
    rng = np.random.default_rng(2)
    on_cpu, on_gpu = twins(TINY, torch.float32, 2)
    pool, stop = SlotPool(NUM_SLOTS), threading.Event()

    def stage() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                torch.empty(1 << 20, device="cuda").copy_(torch.zeros(1 << 20))

    thread = threading.Thread(target=stage)
    thread.start()
    try:
        graphs = gathering_graphs(on_gpu)
        for lengths in ([3], [200, 5], [7] * 12):
            batch = decode_batch(rng, pool, rows_of_lengths(pool, lengths), on_gpu)
            logits = replay(graphs, batch)
            torch.testing.assert_close(logits.cpu(), ragged(on_cpu, batch), atol=1e-4, rtol=1e-4)
    finally:
        stop.set()
        thread.join()


def test_uploads_arrive_whole_when_sent_one_after_another():
    upload = Upload(torch.device("cuda"))
    arrays = [np.full(1 << 18, number) for number in range(8)]
    sent = [upload([array, array[:3] > 2]) for array in arrays]
    for number, (values, flags) in enumerate(sent):
        assert bool((values == number).all())
        assert flags.tolist() == [number > 2] * 3


@pytest.mark.parametrize("seed", range(4))
def test_flashinfer_equals_gathering_in_graphs(seed: int):
    rng = np.random.default_rng(seed)
    on_cpu, on_gpu = twins(LARGE_HEADS, torch.bfloat16, seed)
    pool = SlotPool(NUM_SLOTS)
    reader = flashinfer.FlashInferReader(library(), on_gpu, LIMITS)
    graphs = GraphedDecode(StaticDecode(on_gpu, reader), on_gpu.device)
    gathered = GatherReader(on_gpu.kv_cache, LIMITS)
    rows = grown_rows(rng, pool, longest=200)
    for _ in range(5):
        batch = decode_batch(rng, pool, rows, on_gpu)
        logits = replay(graphs, batch)
        torch.testing.assert_close(logits, eager(on_gpu, gathered, batch), atol=0.3, rtol=0.05)
        torch.testing.assert_close(logits.cpu(), ragged(on_cpu, batch), atol=0.5, rtol=0.1)
    assert graphs.num_graphs == 1


def test_a_flashinfer_graph_serves_rows_that_grow_and_rows_that_leave():
    rng = np.random.default_rng(3)
    _, on_gpu = twins(LARGE_HEADS, torch.bfloat16, 3)
    pool = SlotPool(NUM_SLOTS)
    reader = flashinfer.FlashInferReader(library(), on_gpu, LIMITS)
    graphs = GraphedDecode(StaticDecode(on_gpu, reader), on_gpu.device)
    gathered = GatherReader(on_gpu.kv_cache, LIMITS)
    rows = rows_of_lengths(pool, [1, 900, 3, 40, 2000, 7, 8])
    for num_rows in (7, 5, 6, 5, 7):
        batch = decode_batch(rng, pool, rows[:num_rows], on_gpu)
        logits = replay(graphs, batch)
        torch.testing.assert_close(logits, eager(on_gpu, gathered, batch), atol=0.3, rtol=0.05)
    assert graphs.num_graphs == 1


def attend_both_ways(batch: Batch, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's result through FlashInfer outside of graphs, and gathered."""
    _, on_gpu = twins(LARGE_HEADS, torch.bfloat16, seed)
    shape = (len(batch.token_ids), on_gpu.num_q + 2 * on_gpu.num_kv, LARGE_HEADS.head_dim)
    heads = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    upload = Upload(on_gpu.device)
    paged = flashinfer.FlashInferBatches(library(), on_gpu).place(batch, upload).attend
    placed = to_device(batch, upload)
    pooled = PooledAttention(on_gpu.kv_cache, placed.slots, placed.groups)
    return paged(0, heads), pooled(0, heads)


@pytest.mark.parametrize("seed", range(4))
def test_flashinfer_equals_gathering_for_prompts_and_replays(seed: int):
    rng = np.random.default_rng(seed)
    pool = SlotPool(NUM_SLOTS)
    streams = [stream_on(row, 20, 3) for row in grown_rows(rng, pool, longest=120)]
    rows = rows_of_lengths(pool, rng.integers(0, 60, size=5).tolist())
    feeds = [feed_on(rng, pool, row, int(rng.integers(1, 300))) for row in rows]
    feeds += [replayed(rng, pool, 0), replayed(rng, pool, 7)]
    paged, pooled = attend_both_ways(assemble(streams, feeds, pool)[0], seed)
    torch.testing.assert_close(paged, pooled, atol=0.02, rtol=0.02)


def test_two_levels_of_flashinfer_equal_gathering(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(4)
    pool = SlotPool(NUM_SLOTS)
    rows = rows_of_lengths(pool, [30, 9])
    prompt = pool.open_row(None, 2500)
    pool.append(prompt, 2500)
    for length in (3, 50, 1):
        rows.append(pool.open_row(prompt, 2600))
        pool.append(rows[-1], length)
    batch = decode_batch(rng, pool, rows, twins(LARGE_HEADS, torch.bfloat16, 4)[1])
    monkeypatch.setattr(flashinfer, "_CASCADE_BYTES", 1)
    found = decode_rows(batch)
    assert found is not None
    assert paged_plan.cascade_of(found) is not None
    paged, pooled = attend_both_ways(batch, 4)
    torch.testing.assert_close(paged, pooled, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("model", "dtype", "gap"),
    [(TINY, "fp32", 1e-4), (LARGE_HEADS, "bf16", 0.3)],
    ids=["fp32", "bf16"],
)
def test_an_engine_on_a_gpu_records_what_one_masked_pass_gives(
    model: ModelConfig, dtype: str, gap: float
):
    config = EngineConfig(dtype=dtype, num_kv_slots=4096, max_streams=24, debug_checks=True)
    engine = EmbeddedEngine(model, config, SMALL, device="cuda")
    rng, request_ids = random.Random(0), []
    engine.load(random_weights(model, 0))
    for rollout in range(8):
        structure = random_structure(rng, (20, 21, 22), SMALL, num_blocks=(2, 3))
        request = request_for(structure.prompt_ids, rollout=rollout)
        request_ids.append(request.request_id)
        engine.add(request, teacher_of(structure.token_ids, structure.prompt_length, SMALL))
    trajectories = drain_preempting(engine, request_ids, every=9)
    scored = engine.score(trajectories)
    for trajectory, logprobs in zip(trajectories, scored, strict=True):
        np.testing.assert_allclose(trajectory.logprobs, logprobs, atol=gap, rtol=gap)
    assert_nothing_is_left(engine)


def test_padding_alone_changes_the_spare_slot_only():
    _, on_gpu = twins(TINY, torch.float32, 5)
    before = [cache.clone() for cache in on_gpu.kv_cache]
    static = StaticDecode(on_gpu, GatherReader(on_gpu.kv_cache, LIMITS))
    static.load_padding(Bucket(8, 128))
    with torch.inference_mode():
        static.forward(Bucket(8, 128))
    for cache, old in zip(on_gpu.kv_cache, before, strict=True):
        changed = (cache != old).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
        assert changed == [NUM_SLOTS + 1]
