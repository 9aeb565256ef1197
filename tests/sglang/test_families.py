"""SglangEngine with models other than dense Qwen3: what it writes is what the embedded one writes,
the experts of every token included.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.interface import Engine
from npr_megatron.engine.sglang.engine import SglangEngine
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles, tile_view
from tests.engines import EXPERTS, LLAMA, drain, request_for, skeleton_of, steered_weights
from tests.listeners import STREAMS
from tests.structures import SMALL, WORDS, random_structure

SPARSE = EXPERTS.model_copy(
    update={"moe": EXPERTS.moe and EXPERTS.moe.model_copy(update={"num_dense_layers": 0})}
)
CONFIG = EngineConfig(
    num_kv_slots=4096, max_running=16, max_streams=64, debug_checks=True, record_routes=True
)
EXACT = tuple(name for name in STREAMS if name != "logprobs")


def as_sglang_has_them(model: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    tiles = engine_layout(model).ranks[0].tiles
    canonical = {tile.parameter: tile_view(tile, weights) for tile in tiles}
    (layout,) = engine_layout(model, engine="sglang").ranks
    filled = empty_storages(layout, torch.float32)
    load_tiles(layout, box_reader(canonical), filled)
    return filled


def decode(engine: Engine) -> list[Trajectory]:
    """Trees and plain text side by side; two of the trees end within their branches."""
    rng = random.Random(4)
    for rollout in range(8):
        prompt = (20, 21, 22 + rng.randrange(2))
        structure = random_structure(
            rng, prompt, SMALL, num_blocks=(1, 3), max_branches=4, max_tokens=6
        )
        request = request_for(
            prompt,
            rollout=rollout,
            seed=rollout,
            mode=DecodeMode.SEQUENTIAL if rollout == 3 else DecodeMode.PARALLEL,
            max_new_tokens=30 if rollout in (3, 5, 6) else 400,
        )
        engine.add(request, skeleton_of(structure.token_ids, len(prompt), SMALL))
    return sorted(drain(engine), key=lambda trajectory: trajectory.rollout)


@pytest.mark.parametrize("model", [SPARSE, LLAMA], ids=lambda model: model.family)
def test_trajectories_and_routes_are_those_of_the_embedded_engine(model: ModelConfig) -> None:
    weights = steered_weights(model, 2, WORDS, margin=15.0)
    alone = EmbeddedEngine(model, CONFIG, SMALL)
    alone.load(weights)
    engine = SglangEngine(model, CONFIG, SMALL)
    try:
        engine.load(as_sglang_has_them(model, weights))
        found = decode(engine)
        engine.check_integrity()
    finally:
        engine.close()
    num_whole = 0
    for trajectory, wanted in zip(found, decode(alone), strict=True):
        assert (trajectory.finish, trajectory.finish_detail) == (
            wanted.finish,
            wanted.finish_detail,
        )
        for name in EXACT:
            np.testing.assert_array_equal(getattr(trajectory, name), getattr(wanted, name), name)
        np.testing.assert_allclose(trajectory.logprobs, wanted.logprobs, atol=1e-4)
        if model.moe is None:
            assert trajectory.routed_experts is None
            continue
        routes, others = trajectory.routed_experts, wanted.routed_experts
        assert routes is not None and others is not None
        is_known = (routes >= 0).all(axis=(1, 2))
        np.testing.assert_array_equal(np.sort(routes[is_known]), np.sort(others[is_known]))
        if trajectory.finish is FinishReason.STOP:
            num_whole += 1
            np.testing.assert_array_equal(np.sort(routes), np.sort(others))
    assert num_whole >= 4 or model.moe is None
