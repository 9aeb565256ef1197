"""The same requests give the same trajectories whatever else the engine does.

The policy has learnt the tag language, so forks, joins and broken endings are sampled. Log-probs
agree to rounding; a draw could only differ if its number fell within that rounding of a bound, and
those of these seeds do not.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from npr_megatron.engine.flow.flow import Teacher
from npr_megatron.engine.stats import EngineStats
from npr_megatron.records.request import GenerationRequest, RefusalPolicy
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from npr_megatron.schema.render import BlockTexts
from tests.engines import (
    TINY,
    assert_nothing_is_left,
    assert_same_trajectory,
    drain_preempting,
    request_for,
    teacher_of,
    tiny_engine,
)
from tests.policy import learnt_weights, prompt_of
from tests.structures import SMALL, Structure

DRAWS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 6},
    {"min_p": 0.05},
    {"repetition_penalty": 1.1, "step_repetition_penalty": 1.02},
    {"temperature": 0.7, "top_p": 0.95, "top_k": 12, "min_p": 0.01, "repetition_penalty": 1.05},
]
NUM_REQUESTS = 64
LARGEST_NEED = 4 + 120
"""KV slots of the longest prompt and budget."""
SCHEDULES: dict[str, dict[str, Any]] = {
    "one at a time": {"max_running": 1},
    "eight at a time": {"max_running": 8},
    "permuted": {"order": 1},
    "permuted, eight at a time": {"order": 2, "max_running": 8},
    "waves": {"max_streams": 5},
    "preempted": {"preempted_every": 2},
    "a pool for one": {"num_kv_slots": LARGEST_NEED},
    "a pool for a few": {"num_kv_slots": 320},
    "everything": {
        "order": 3,
        "preempted_every": 3,
        "max_streams": 5,
        "max_step_tokens": 8,
        "num_kv_slots": 2 * LARGEST_NEED,
    },
}


LONG_STEPS = Structure(
    vocabulary=SMALL,
    prompt_ids=(20, 21),
    blocks=(BlockTexts(((22,), (23,), (24,)), ((25,) * 9, (26,) * 14, (27,) * 12), (28,)),),
    conclusion=(29,),
)
LONG_STEPS_TEACHER = teacher_of(LONG_STEPS.token_ids, 2, SMALL)
Arrival = tuple[GenerationRequest, Teacher | None]


def arrivals() -> list[Arrival]:
    """Groups of four that are sampled freely, and sixteen whose long steps the budget cuts."""
    rng = random.Random(9)
    prompts = [prompt_of(rng) for _ in range(NUM_REQUESTS // 4)]
    found: list[Arrival] = []
    for number in range(NUM_REQUESTS):
        is_led = number % 4 == 3
        request = request_for(
            LONG_STEPS.prompt_ids if is_led else prompts[number // 4],
            rollout=number,
            seed=rng.getrandbits(64),
            mode=DecodeMode.SEQUENTIAL if number % 9 == 8 else DecodeMode.PARALLEL,
            max_new_tokens=rng.randint(45, 64) if is_led else 120,
            max_critical_path=rng.choice([120, rng.randint(24, 36)]),
            on_refusal=rng.choice(list(RefusalPolicy)),
            **DRAWS[number % len(DRAWS)],
        )
        found.append((request, LONG_STEPS_TEACHER if is_led else None))
    return found


def decode(
    arrivals: Sequence[Arrival],
    order: int | None = None,
    preempted_every: int = 10**9,
    **settings: Any,
) -> tuple[list[Trajectory], EngineStats]:
    """Return the trajectories by rollout, and what the engine did."""
    engine = tiny_engine(weights=learnt_weights(TINY), **settings)
    for request, teacher in permuted(arrivals, order):
        engine.add(request, teacher)
    ids = [request.request_id for request, _ in arrivals]
    finished = drain_preempting(engine, ids, preempted_every)
    assert_nothing_is_left(engine)
    return sorted(finished, key=lambda trajectory: trajectory.rollout), engine.stats()


def permuted(arrivals: Sequence[Arrival], order: int | None) -> list[Arrival]:
    """Shuffle by the seed ``order``."""
    found = list(arrivals)
    if order is not None:
        random.Random(order).shuffle(found)
    return found


@functools.cache
def all_together() -> list[Trajectory]:
    trajectories, stats = decode(arrivals())
    assert stats.num_preemptions == 0
    return trajectories


def test_the_sample_holds_what_could_go_wrong() -> None:
    trajectories = all_together()
    assert sum(t.branch.max() > 1 for t in trajectories if t.rollout % 4 != 3) > 12
    cut = [t for t in trajectories if t.branch[-1] > 0]
    assert {t.finish for t in cut} >= {FinishReason.LENGTH, FinishReason.CRITICAL_PATH}
    assert FinishReason.STOP in {t.finish for t in trajectories}
    assert len({tuple(t.response_ids.tolist()) for t in trajectories}) > NUM_REQUESTS * 0.8


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_changes_a_token(schedule: str) -> None:
    settings = SCHEDULES[schedule]
    trajectories, stats = decode(arrivals(), **settings)
    for found, expected in zip(trajectories, all_together(), strict=True):
        assert_same_trajectory(found, expected, tolerance=1e-5)
    if "preempted_every" in settings:
        assert stats.num_preemptions > 0
        assert stats.num_replayed_tokens > 0


def test_seeds_given_by_arrival_would_show() -> None:
    """The control: were seeds drawn in order of arrival, permuting the arrivals changes texts."""

    def by_arrival(order: int) -> list[Trajectory]:
        arriving = enumerate(permuted(arrivals(), order))
        seeded = [(dataclasses.replace(request, seed=i), led) for i, (request, led) in arriving]
        return decode(seeded)[0]

    pairs = zip(by_arrival(1), by_arrival(2), strict=True)
    num_other = sum(not np.array_equal(a.token_ids, b.token_ids) for a, b in pairs)
    assert num_other > NUM_REQUESTS / 2
