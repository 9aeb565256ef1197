"""Experts on a GPU: grouped products inside of graphs, shared out by the host elsewhere.

Skipped without one; ``tests/unit/engine/test_cuda.py`` says how to run them.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from npr_megatron.config.engine import EngineConfig
from npr_megatron.engine.compute.decode_rows import BucketLimits, decode_rows
from npr_megatron.engine.compute.experts import Experts
from npr_megatron.engine.compute.graphs import GraphedDecode
from npr_megatron.engine.compute.model import EngineModel
from npr_megatron.engine.compute.routes import RouteCache
from npr_megatron.engine.compute.static_decode import GatherReader, StaticDecode
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.memory.pool import SlotPool
from tests.batches import decode_batch, grown_rows
from tests.engines import (
    EXPERTS,
    assert_same_trajectory,
    drain,
    random_weights,
    request_for,
    skeleton_of,
    steered_weights,
)
from tests.structures import SMALL, WORDS
from tests.unit.engine.test_decoding import PROMPT, RESPONSE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NUM_SLOTS = 8192
LIMITS = BucketLimits(max_rows=32, max_reads=1 << 18)
has_grouped_products = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9, reason="needs Hopper"
)


def model_with(dtype: torch.dtype, seed: int) -> EngineModel:
    model = EngineModel(EXPERTS, num_slots=NUM_SLOTS + 1, dtype=dtype, device=torch.device("cuda"))
    for name, weight in random_weights(EXPERTS, seed).items():
        model.weights[name].copy_(weight)
    return model


@has_grouped_products
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_grouped_products_are_those_of_one_expert_after_another(num_tokens: int) -> None:
    (experts, *_) = [
        layer.mlp
        for layer in model_with(torch.bfloat16, 0)._layers
        if isinstance(layer.mlp, Experts)
    ]
    assert experts.is_grouped
    hidden = torch.randn(num_tokens, EXPERTS.hidden_size, device="cuda").bfloat16()
    _, chosen = experts.route(hidden)
    owners, order = chosen.flatten().sort(stable=True)
    inputs = hidden.index_select(0, order // chosen.shape[1])
    torch.testing.assert_close(
        experts._grouped(inputs, owners), experts._apart(inputs, owners), atol=2e-2, rtol=2e-2
    )


@has_grouped_products
@torch.inference_mode()
def test_a_replay_equals_the_eager_pass_bit_for_bit_routes_included() -> None:
    rng = np.random.default_rng(0)
    model, pool = model_with(torch.bfloat16, 1), SlotPool(NUM_SLOTS)
    assert not model.asks_the_host
    reader = GatherReader(model.kv_cache, LIMITS)
    replayed, computed = (RouteCache(EXPERTS, NUM_SLOTS + 1, model.device) for _ in range(2))
    graphs = GraphedDecode(StaticDecode(model, reader, replayed), model.device)
    eager = StaticDecode(model, reader, computed)
    grown = grown_rows(rng, pool, longest=200)
    for _ in range(5):
        batch = decode_batch(rng, pool, grown, model)
        rows = decode_rows(batch)
        assert rows is not None
        logits, expected = graphs.run(rows), eager.run(rows)
        assert logits is not None and expected is not None
        assert torch.equal(logits, expected)
        slots = batch.slots.astype(np.int32)
        np.testing.assert_array_equal(replayed.read(slots), computed.read(slots))
        assert (replayed.read(slots) >= 0).all()
    assert (replayed.read(np.zeros(1, np.int32)) == -1).all()


def test_in_single_precision_nothing_is_captured_and_the_engine_says_why(caplog) -> None:
    found = []
    with caplog.at_level(logging.WARNING):
        for device in ("cpu", "cuda"):
            engine = EmbeddedEngine(
                EXPERTS,
                EngineConfig(num_kv_slots=4096, record_routes=True),
                SMALL,
                device=device,
            )
            engine.load(steered_weights(EXPERTS, 3, WORDS))
            skeleton = skeleton_of([*PROMPT, *RESPONSE], len(PROMPT), SMALL)
            engine.add(request_for(PROMPT, temperature=0.0, max_new_tokens=120), skeleton)
            found += drain(engine)
    assert "without CUDA graphs" in caplog.text
    assert_same_trajectory(found[1], found[0], 1e-4)
