"""The experts that a trajectory records: those that computed its tokens, whatever the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from npr_megatron.config.engine import EngineConfig
from npr_megatron.engine.compute.attention import DenseAttention
from npr_megatron.engine.compute.decode_rows import BucketLimits, decode_rows
from npr_megatron.engine.compute.model import EngineModel
from npr_megatron.engine.compute.routes import RouteCache
from npr_megatron.engine.compute.runner import LocalRunner
from npr_megatron.engine.compute.static_decode import GatherReader, StaticDecode
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.memory.pool import SlotPool
from npr_megatron.engine.schedule.batch import Batch
from npr_megatron.records.trajectory import FinishReason, RouteArray, Trajectory
from npr_megatron.topology.visibility import dense_mask
from tests.batches import decode_batch, rows_of_lengths
from tests.engines import (
    EXPERTS,
    UNTIED,
    assert_same_trajectory,
    drain,
    drain_preempting,
    random_weights,
    request_for,
    skeleton_of,
    steered_weights,
    tiny_engine,
)
from tests.structures import SMALL, WORDS
from tests.unit.engine.test_decoding import PROMPT, RESPONSE

SKELETON = skeleton_of([*PROMPT, *RESPONSE], len(PROMPT), SMALL)
NUM_ROLLOUTS = 5
WEIGHTS, OTHERS = (steered_weights(EXPERTS, seed, WORDS, margin=15.0) for seed in (3, 9))


def decode(
    preempted_every: int | None = None, model=EXPERTS, weights=WEIGHTS, **settings: Any
) -> list[Trajectory]:
    """Trees of two forks, rollouts of one prompt and of a longer one that begins alike."""
    engine = tiny_engine(model=model, weights=weights, **{"record_routes": True, **settings})
    for rollout in range(NUM_ROLLOUTS):
        prompt = [*PROMPT, 21, 22] if rollout % 2 else PROMPT
        request = request_for(prompt, rollout=rollout, seed=rollout, max_new_tokens=120)
        engine.add(request, SKELETON)
    ids = [f"p#{rollout}" for rollout in range(NUM_ROLLOUTS)]
    ended = drain_preempting(engine, ids, preempted_every) if preempted_every else drain(engine)
    return sorted(ended, key=lambda trajectory: trajectory.rollout)


def computed_again(trajectory: Trajectory) -> RouteArray:
    """[T, M, K] by one masked pass over the whole tree, without a pool."""
    model = EngineModel(EXPERTS, num_slots=1, dtype=torch.float32, device=torch.device("cpu"))
    for name, weight in WEIGHTS.items():
        model.weights[name].copy_(weight)
    block, branch = (
        torch.from_numpy(np.array(stream)) for stream in (trajectory.block, trajectory.branch)
    )
    attend = DenseAttention(
        dense_mask(torch.zeros_like(block)[None], block[None], branch[None])[:, None], model.num_kv
    )
    routes = np.full((len(block), 2, 2), -1, np.int16)

    def record(layer: int, chosen: torch.Tensor) -> None:
        routes[:, layer] = chosen.numpy()

    ids, positions = (
        torch.from_numpy(np.array(stream)).long()
        for stream in (trajectory.token_ids, trajectory.position_ids)
    )
    model.hidden(ids, positions, attend, record)
    return routes


@pytest.fixture(scope="module")
def trajectories() -> list[Trajectory]:
    return decode()


def routes_of(trajectories: Sequence[Trajectory]) -> list[RouteArray]:
    return [t.routed_experts for t in trajectories if t.routed_experts is not None]


def test_every_token_that_was_computed_has_the_experts_that_computed_it(trajectories) -> None:
    assert all(t.num_blocks == 2 for t in trajectories)
    recorded = routes_of(trajectories)
    assert len(recorded) == NUM_ROLLOUTS
    for trajectory, routes in zip(trajectories, recorded, strict=True):
        is_computed = routes[:, 0, 0] >= 0
        # Nobody computed the token that ended it; all others were read by someone behind them.
        assert np.flatnonzero(~is_computed).tolist() == [len(routes) - 1]
        assert (routes[-1] == -1).all()
        expected = computed_again(trajectory)
        np.testing.assert_array_equal(routes[is_computed], expected[is_computed])
        assert len(np.unique(routes[is_computed], axis=0)) > 8, "tokens go different ways"


SCHEDULES: dict[str, dict[str, Any]] = {
    "one at a time": {"max_running": 1},
    "waves": {"max_streams": 5},
    "chunked prefill": {"max_step_tokens": 16, "max_streams": 8},
    "small pool": {"num_kv_slots": 260},
    "preempted": {"preempted_every": 7},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_changes_what_is_recorded(schedule: str, trajectories) -> None:
    for found, expected in zip(decode(**SCHEDULES[schedule]), trajectories, strict=True):
        assert_same_trajectory(found, expected, 1e-5)


def test_tokens_that_end_a_branch_without_being_fed_say_so(trajectories) -> None:
    engine = tiny_engine(model=EXPERTS, weights=WEIGHTS, record_routes=True)
    engine.add(request_for(PROMPT, max_new_tokens=120), SKELETON)
    while not engine.progress or engine.progress < 20:
        engine.step()
    engine.abort("p#0")
    (cut,) = engine.step()
    assert cut.finish is FinishReason.ABORTED
    assert cut.branch[-1] > 1, "within the branches"
    (routes,) = routes_of([cut])
    last = np.flatnonzero(np.diff(cut.branch, append=0) != 0)
    inside = last[cut.branch[last] > 0]
    assert (routes[inside] == -1).all()
    is_computed = routes[:, 0, 0] >= 0
    assert (~is_computed).sum() <= cut.branch.max()
    np.testing.assert_array_equal(routes[is_computed], computed_again(cut)[is_computed])


def test_nothing_is_recorded_unasked_nor_without_experts_nor_of_what_holds_no_memory() -> None:
    assert routes_of(decode(record_routes=False)) == []
    assert routes_of(decode(model=UNTIED, weights=random_weights(UNTIED, 0))) == []
    engine = tiny_engine(model=EXPERTS, weights=WEIGHTS, record_routes=True)
    engine.add(request_for(PROMPT), SKELETON)
    for _ in range(12):
        engine.step()
    engine.preempt("p#0")
    engine.abort("p#0")
    (ended,) = engine.step()
    assert ended.num_tokens > 0
    assert ended.routed_experts is None


def test_new_weights_leave_the_routes_of_what_is_computed_anew() -> None:
    """``recompute``: later tokens read keys and values of the new routes, so these are recorded."""
    engine = tiny_engine(model=EXPERTS, weights=OTHERS, record_routes=True)
    engine.add(request_for(PROMPT, max_new_tokens=120), SKELETON)
    for _ in range(20):
        engine.step()
    engine.load(WEIGHTS, version=1)
    (trajectory,) = drain(engine)
    (routes,) = routes_of([trajectory])
    is_computed = routes[:, 0, 0] >= 0
    assert set(trajectory.weight_versions.tolist()) == {-1, 0, 1}
    np.testing.assert_array_equal(routes[is_computed], computed_again(trajectory)[is_computed])


class StaticRunner(LocalRunner):
    """Computes single tokens in the fixed memory that graphs capture."""

    num_static = 0

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(EXPERTS, config.model_copy(update={"num_kv_slots": 4097}))
        reader = GatherReader(self.model.kv_cache, BucketLimits(64, 64 * 512))
        self._static = StaticDecode(self.model, reader, self._routes)

    def run(self, batch: Batch) -> torch.Tensor:
        rows = decode_rows(batch)
        logits = None if rows is None else self._static.run(rows)
        self.num_static += logits is not None
        return super().run(batch) if logits is None else logits


def test_steps_in_fixed_memory_record_the_same(trajectories) -> None:
    config = EngineConfig(num_kv_slots=4096, record_routes=True)
    runner = StaticRunner(config)
    engine = EmbeddedEngine(EXPERTS, config, SMALL, runner=runner)
    engine.load(WEIGHTS)
    for rollout in range(NUM_ROLLOUTS):
        prompt = [*PROMPT, 21, 22] if rollout % 2 else PROMPT
        request = request_for(prompt, rollout=rollout, seed=rollout, max_new_tokens=120)
        engine.add(request, SKELETON)
    ended = sorted(drain(engine), key=lambda trajectory: trajectory.rollout)
    assert runner.num_static > 20
    for found, expected in zip(ended, trajectories, strict=True):
        assert_same_trajectory(found, expected, 1e-4)


def test_padding_leaves_no_route_where_tokens_have_theirs() -> None:
    rng, num_slots = np.random.default_rng(0), 256
    model = EngineModel(
        EXPERTS, num_slots=num_slots + 1, dtype=torch.float64, device=torch.device("cpu")
    )
    for name, weight in WEIGHTS.items():
        model.weights[name].copy_(weight)
    routes, pool = RouteCache(EXPERTS, num_slots + 1, model.device), SlotPool(num_slots)
    static = StaticDecode(model, GatherReader(model.kv_cache, BucketLimits(8, 8 * 256)), routes)
    batch = decode_batch(rng, pool, rows_of_lengths(pool, [3, 9, 5]), model)
    rows = decode_rows(batch)
    assert rows is not None
    static.run(rows)
    recorded = routes.read(np.arange(num_slots + 1, dtype=np.int32))
    is_recorded = (recorded >= 0).all(axis=(1, 2))
    assert np.flatnonzero(is_recorded).tolist() == sorted(batch.slots.tolist())
    assert (recorded[~is_recorded] == -1).all()
