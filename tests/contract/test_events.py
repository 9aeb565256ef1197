"""What every backend tells of a growing trajectory, replayed, is the trajectory."""

from __future__ import annotations

import random

import pytest

from npr_megatron.engine.events import Event, FinishEvent, TokenEvent
from npr_megatron.engine.interface import Engine
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from tests.contract.backends import MODEL, ROUNDING, Asked, Backend, decode, policy_weights
from tests.engines import (
    assert_same_trajectory,
    drain,
    random_weights,
    request_for,
    step_until,
    teacher_of,
)
from tests.listeners import Replay, assert_told, listen
from tests.structures import random_structure


def trees(backend: Backend, num_trees: int) -> list[Asked]:
    """Trees of two or three blocks."""
    rng = random.Random(7)
    asked: list[Asked] = []
    for rollout in range(num_trees):
        prompt = rng.choices(range(20, 30), k=rng.randint(1, 6))
        structure = random_structure(
            rng, prompt, backend.vocabulary, num_blocks=(2, 3), max_tokens=3
        )
        teacher = teacher_of(structure.token_ids, len(prompt), backend.vocabulary)
        asked.append((request_for(prompt, rollout=rollout), teacher))
    return asked


def test_replaying_the_events_rebuilds_the_trajectory(engine: Engine, backend: Backend) -> None:
    """With and without listeners the trajectories are the same."""
    weights = random_weights(MODEL, 0)
    backend.load(engine, weights)
    asked = trees(backend, 8)
    replays = [listen(engine, *one) for one in asked]
    finished = sorted(drain(engine), key=lambda trajectory: trajectory.rollout)
    assert_told(replays, finished)
    assert all(t.finish is FinishReason.STOP for t in finished)
    assert not any(replay.num_restarts for replay in replays)
    for pair in zip(decode(engine, asked), finished, strict=True):
        assert_same_trajectory(*pair, tolerance=ROUNDING)


def test_a_preempted_trajectory_tells_each_token_once(engine: Engine, backend: Backend) -> None:
    backend.load(engine, random_weights(MODEL, 0))
    rng, finished = random.Random(2), list[Trajectory]()
    replays = [listen(engine, *one) for one in trees(backend, 5)]
    while engine.num_unfinished:
        finished += engine.step()
        if engine.num_unfinished and rng.random() < 0.2:
            engine.preempt(rng.choice(sorted(engine.unfinished)))
    assert_told(replays, finished)


@pytest.mark.parametrize("mode", list(DecodeMode))
def test_answers_that_break_off_are_told_to_their_last_token(
    engine: Engine, backend: Backend, mode: DecodeMode
) -> None:
    backend.load(engine, policy_weights(backend.vocabulary))
    replays = [
        listen(
            engine,
            request_for((22, 23), rollout=limit, seed=limit, mode=mode, max_new_tokens=limit),
        )
        for limit in (1, 7, 18, 30, 45)
    ]
    assert_told(replays, drain(engine))


@pytest.mark.parametrize("num_told", [0, 3, 14, 30, 45])
def test_an_aborted_answer_is_told_as_far_as_it_came(
    engine: Engine, backend: Backend, num_told: int
) -> None:
    backend.load(engine, random_weights(MODEL, 0))
    ((request, teacher),) = trees(backend, 1)
    replay = listen(engine, request, teacher)
    is_told = lambda: len(replay.linear()) >= num_told or not engine.num_unfinished  # noqa: E731
    finished = step_until(engine, is_told)
    if engine.num_unfinished:
        engine.abort(request.request_id)
    assert_told([replay], finished + drain(engine))


def test_tokens_are_told_while_others_are_still_to_come(engine: Engine, backend: Backend) -> None:
    backend.load(engine, random_weights(MODEL, 0))
    told: list[Event] = []
    request = request_for((20, 21), mode=DecodeMode.SEQUENTIAL, max_new_tokens=300)
    engine.add(request, lambda block, branch, index: 20, told.append)
    lengths = set()
    while engine.num_unfinished:
        engine.step()
        lengths.add(sum(isinstance(event, TokenEvent) for event in told))
    assert isinstance(told[-1], FinishEvent)
    assert max(lengths) == 300
    assert len(lengths) > 20


def test_a_listener_may_add_requests(engine: Engine, backend: Backend) -> None:
    backend.load(engine, random_weights(MODEL, 0))
    first, second = (request_for((20, 21), rollout=i, max_new_tokens=4) for i in range(2))
    ended: list[str] = []

    def follow(event: Event) -> None:
        if isinstance(event, FinishEvent):
            ended.append(event.request_id)
            if event.request_id == first.request_id:
                engine.add(second, listener=follow)

    engine.add(first, listener=follow)
    assert [trajectory.rollout for trajectory in drain(engine)] == [0, 1]
    assert ended == ["p#0", "p#1"]


def test_a_stream_tells_of_all_its_requests_and_leaves_the_engine_free(
    engine: Engine, backend: Backend
) -> None:
    backend.load(engine, random_weights(MODEL, 0))
    requests = [request_for((20, 21), rollout=i, max_new_tokens=5 + i) for i in range(3)]
    replays = {request.request_id: Replay(request.request_id) for request in requests}
    for event in engine.stream(requests):
        replays[event.request_id].take(event)
    assert engine.num_unfinished == 0
    finished = [replay.trajectory for replay in replays.values()]
    for pair in zip(finished, engine.generate(requests), strict=True):
        assert_same_trajectory(*pair, tolerance=ROUNDING)


def test_a_stream_that_is_left_early_leaves_the_engine_free(
    engine: Engine, backend: Backend
) -> None:
    backend.load(engine, random_weights(MODEL, 0))
    events = engine.stream(
        [request_for((20,), mode=DecodeMode.SEQUENTIAL, rollout=i) for i in range(4)]
    )
    assert isinstance(next(events), TokenEvent)
    events.close()
    assert engine.num_unfinished == 0
    assert len(engine.generate([request_for((20,), max_new_tokens=2)])) == 1
