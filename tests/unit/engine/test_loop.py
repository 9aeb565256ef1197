"""The thread that owns an engine: actions between steps, errors for everybody, a clean end."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from npr_megatron.engine.loop import EngineLoop
from npr_megatron.errors import EnvironmentFault, InputError
from npr_megatron.records.trajectory import DecodeMode, Trajectory
from tests.engines import request_for, run_one, tiny_engine

WAIT_S = 30.0


class Owner:
    """A loop and what it told."""

    def __init__(self) -> None:
        self.engine = tiny_engine()
        self.finished: list[Trajectory] = []
        self.failures: list[Exception] = []
        self.changed = threading.Event()
        self.loop = EngineLoop(self.engine, self._take, self._fail)
        self.loop.start()

    def _take(self, finished: list[Trajectory]) -> None:
        self.finished += finished
        self.changed.set()

    def _fail(self, error: Exception) -> None:
        self.failures.append(error)
        self.changed.set()

    def submit(self, rollout: int, max_new_tokens: int = 20) -> None:
        request = request_for(
            (20, 21),
            rollout=rollout,
            mode=DecodeMode.SEQUENTIAL,
            max_new_tokens=max_new_tokens,
            seed=rollout,
        )
        self.loop.between_steps(lambda: self.engine.add(request))

    def wait_for_all(self) -> None:
        while self.engine.num_unfinished:
            assert self.changed.wait(WAIT_S)
            self.changed.clear()


@pytest.fixture
def owner():
    owner = Owner()
    yield owner
    owner.loop.stop(WAIT_S)


def test_the_loop_decodes_what_it_is_given_and_sleeps_in_between(owner):
    for rollout in range(3):
        owner.submit(rollout)
    owner.wait_for_all()
    num_steps = owner.loop.num_steps
    assert num_steps >= 20
    assert sorted(t.rollout for t in owner.finished) == [0, 1, 2]
    alone = run_one(
        tiny_engine(),
        request_for((20, 21), mode=DecodeMode.SEQUENTIAL, max_new_tokens=20, seed=0),
    )
    mine = next(t for t in owner.finished if t.rollout == 0)
    assert mine.token_ids.tolist() == alone.token_ids.tolist()
    owner.loop.between_steps(lambda: None)
    assert owner.loop.num_steps == num_steps


def test_actions_wait_for_at_most_one_step(owner):
    owner.submit(0, 400)
    waited = [owner.loop.between_steps(lambda: None) for _ in range(200)]
    assert set(waited) <= {0, 1}
    assert 1 in waited


def test_an_error_on_purpose_goes_to_who_asked_and_no_further(owner):
    def refuse() -> None:
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        owner.loop.between_steps(refuse)
    owner.submit(0)
    owner.wait_for_all()
    assert owner.failures == [] and len(owner.finished) == 1


def test_any_other_error_ends_the_loop_for_everybody(owner):
    ran: list[int] = []

    def break_down() -> None:
        waiting.wait(WAIT_S)
        raise ZeroDivisionError("broken")

    waiting = threading.Event()
    first = owner.loop.post(break_down)
    behind = owner.loop.post(lambda: ran.append(1))
    assert owner.loop.num_pending == 2
    waiting.set()
    for future in (first, behind):
        assert isinstance(future.exception(WAIT_S), ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        owner.loop.between_steps(lambda: None)
    assert owner.changed.wait(WAIT_S)
    assert [str(error) for error in owner.failures] == ["broken"]
    assert ran == [] and owner.loop.num_pending == 0
    assert str(owner.loop.failure) == "broken"


def test_a_cancelled_action_does_not_run(owner):
    ran: list[int] = []
    begun, going_on = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        going_on.wait(WAIT_S)

    holding = owner.loop.post(hold)
    assert begun.wait(WAIT_S)
    cancelled = owner.loop.post(lambda: ran.append(1))
    assert cancelled.cancel()
    going_on.set()
    assert holding.result(WAIT_S) == 0
    owner.loop.between_steps(lambda: ran.append(2))
    assert ran == [2]
    with pytest.raises(CancelledError):
        cancelled.result(WAIT_S)


def test_a_stopped_loop_leaves_the_engine_to_its_owner(owner):
    owner.submit(0, 400)
    owner.loop.stop(WAIT_S)
    owner.loop.stop(WAIT_S)
    with pytest.raises(EnvironmentFault, match="after it was stopped"):
        owner.loop.post(lambda: None)
    assert owner.failures == []
    num_steps = owner.loop.num_steps
    assert owner.engine.num_unfinished == 1
    while owner.engine.num_unfinished:
        owner.engine.step()
    assert owner.loop.num_steps == num_steps


def test_a_step_that_does_not_end_is_told(owner):
    going_on = threading.Event()
    holding = owner.loop.post(lambda: going_on.wait(WAIT_S) and None)
    with pytest.raises(EnvironmentFault, match="still computing a step"):
        owner.loop.stop(0.05)
    going_on.set()
    holding.result(WAIT_S)
