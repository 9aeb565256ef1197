"""Sampled trajectories are the same on every backend: randomness derives from names alone."""

from __future__ import annotations

import random
from typing import Any

import pytest

from npr_megatron.engine.interface import Engine
from npr_megatron.records.request import RefusalPolicy
from npr_megatron.records.trajectory import DecodeMode
from tests.contract.backends import ROUNDING, Asked, Backend, decode, policy_weights
from tests.engines import assert_same_trajectory, request_for
from tests.policy import prompt_of

DRAWS: dict[str, dict[str, Any]] = {
    "of the policy": {},
    "greedy": {"temperature": 0.0},
    "nucleus": {"temperature": 0.8, "top_p": 0.9},
    "top-k": {"temperature": 1.2, "top_k": 6},
    "min-p": {"min_p": 0.05},
    "all filters": {"temperature": 0.7, "top_p": 0.95, "top_k": 12, "min_p": 0.01},
}
NUM_REQUESTS = 48


def asked() -> list[Asked]:
    """Groups of four rollouts whose forks and ends the policy decides, under every kind of draw."""
    rng = random.Random(9)
    prompts = [prompt_of(rng) for _ in range(NUM_REQUESTS // 4)]
    draws = list(DRAWS.values())
    return [
        (
            request_for(
                prompts[number // 4],
                rollout=number,
                seed=rng.getrandbits(64),
                mode=DecodeMode.SEQUENTIAL if number % 9 == 8 else DecodeMode.PARALLEL,
                max_new_tokens=120,
                max_critical_path=rng.choice([120, rng.randint(24, 36)]),
                on_refusal=rng.choice(list(RefusalPolicy)),
                **draws[number % len(draws)],
            ),
            None,
        )
        for number in range(NUM_REQUESTS)
    ]


def test_sampled_trajectories_are_those_of_the_embedded_engine(
    engine: Engine, backend: Backend
) -> None:
    weights = policy_weights(backend.vocabulary)
    backend.load(engine, weights)
    found = decode(engine, asked())
    expected = backend.expected(asked(), weights)
    for pair in zip(found, expected, strict=True):
        assert_same_trajectory(*pair, tolerance=ROUNDING)
    assert sum(t.branch.max() > 1 for t in found) > NUM_REQUESTS / 3
    assert len({tuple(t.response_ids.tolist()) for t in found}) > NUM_REQUESTS * 0.7
    for trajectory, logprobs in zip(found, engine.score(found), strict=True):
        assert abs(trajectory.logprobs - logprobs).max() <= ROUNDING


def test_requests_alone_and_in_another_order_give_the_same_trajectories(
    engine: Engine, backend: Backend
) -> None:
    backend.load(engine, policy_weights(backend.vocabulary))
    some = asked()[:12]
    together = decode(engine, list(reversed(some)))
    for one, expected in zip(some, together, strict=True):
        (found,) = decode(engine, [one])
        assert_same_trajectory(found, expected, tolerance=ROUNDING)


@pytest.mark.parametrize("name", ["repetition_penalty", "step_repetition_penalty"])
def test_a_penalty_is_applied_or_refused_by_name(
    engine: Engine, backend: Backend, name: str
) -> None:
    request = request_for((20, 21), seed=3, mode=DecodeMode.SEQUENTIAL, max_new_tokens=30)
    penalised = request_for(
        (20, 21), seed=3, mode=DecodeMode.SEQUENTIAL, max_new_tokens=30, **{name: 1.7}
    )
    assert not engine.problems(request)
    if backend.config.backend == "embedded":
        assert not engine.problems(penalised)
    else:
        (problem,) = engine.problems(penalised)
        assert f"{name} is 1.7" in problem
