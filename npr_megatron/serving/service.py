"""An engine among coroutines: requests in, what happens to them out.

The engine's thread collects what a step tells and hands it over at once, so the thread that speaks
HTTP is woken once per step, however many tokens it brings. Nothing here waits for the engine but
``submit`` and ``look``, and these only until the step under way has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from npr_megatron.engine.events import Event
from npr_megatron.engine.interface import Engine
from npr_megatron.engine.loop import EngineLoop
from npr_megatron.engine.stats import EngineStats
from npr_megatron.errors import InputError
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import Trajectory
from npr_megatron.serving.errors import ApiError


class Answer:
    """One request under way, as its reader sees it.

    Args:
        changed: set whenever there is news; the answers of one response share it.
    """

    def __init__(self, request: GenerationRequest, changed: asyncio.Event) -> None:
        self.request = request
        self.trajectory: Trajectory | None = None
        """The record, once it has ended."""
        self.failure: Exception | None = None
        """What ended the engine before the answer."""
        self._events: list[Event] = []
        self._changed = changed

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be told."""
        return self.trajectory is not None or self.failure is not None

    def news(self) -> list[Event]:
        """Return what was told since the last call."""
        events, self._events = self._events, []
        return events

    def tell(self, event: Event) -> None:
        """Add an event."""
        self._events.append(event)
        self._changed.set()

    def end(self, trajectory: Trajectory | None, failure: Exception | None = None) -> None:
        """Nothing more will be told."""
        self.trajectory, self.failure = trajectory, failure
        self._changed.set()


class Service:
    """Answers requests with ``engine``; belongs to the event loop that made it.

    Args:
        engine: holds weights; this object's from now on, until ``stop`` returns.
        capacity: trajectories that may run or wait at once.
        on_end: told, in the event loop, of each answer that the engine hands back.
        on_failure: told, in the engine's thread, what ended the engine.
    """

    def __init__(
        self,
        engine: Engine,
        capacity: int,
        on_end: Callable[[Trajectory], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._engine = engine
        self._capacity = capacity
        self._on_end = on_end
        self._on_failure = on_failure
        self._coroutines = asyncio.get_running_loop()
        self._loop = EngineLoop(engine, self._hand_over, self._report_failure)
        self._told: list[Event] = []
        """What the step under way tells; the engine's thread's."""
        self._open: dict[str, Answer] = {}
        """Every request that the engine has not handed back."""
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._loop.start()

    @property
    def failure(self) -> Exception | None:
        """What ended the engine."""
        return self._loop.failure

    @property
    def num_open(self) -> int:
        """Trajectories that the engine has not handed back."""
        return len(self._open)

    async def submit(
        self, requests: Sequence[GenerationRequest], changed: asyncio.Event, *, is_live: bool
    ) -> list[Answer]:
        """Give ``requests`` to the engine, all or none.

        Args:
            is_live: tell of every token; otherwise of the end only, which costs an engine less.

        Raises:
            ApiError: they are refused, there is no room, or the engine has failed.
        """
        self._require_room(len(requests))
        answers = [Answer(request, changed) for request in requests]
        done = self._post(lambda: self._add(requests, is_live))
        self._open |= {answer.request.request_id: answer for answer in answers}
        self._is_idle.clear()
        added = asyncio.wrap_future(done)
        added.add_done_callback(lambda added: self._forget(answers) if added.exception() else None)
        try:
            await asyncio.wait([added])
        except asyncio.CancelledError:  # the client has hung up
            self.release(answers)
            raise
        try:
            added.result()
        except InputError as error:
            raise ApiError(400, "invalid_request", str(error).splitlines()) from error
        except Exception as error:
            raise engine_failed(error) from error
        return answers

    def release(self, answers: Sequence[Answer]) -> None:
        """End what is unfinished of ``answers`` and free its memory; nobody reads them any more."""
        names = [a.request.request_id for a in answers if a.request.request_id in self._open]
        if names and self.failure is None:
            self._post(lambda: self._abort(names)).add_done_callback(_raise_nothing)

    def release_all(self) -> None:
        """End everything that is unfinished."""
        self.release(list(self._open.values()))

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until the engine has handed back everything; return whether it has."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            return False
        return True

    async def look(self) -> tuple[EngineStats, int]:
        """Return what the engine holds and has done, and the version of its weights.

        Raises:
            ApiError: the engine has failed.
        """
        engine = self._engine
        found: list[tuple[EngineStats, int]] = []
        done = self._post(lambda: found.append((engine.stats(), engine.weight_version)))
        try:
            await asyncio.wrap_future(done)
        except Exception as error:  # whatever ended the engine
            raise engine_failed(error) from error
        return found[0]

    def stop(self, timeout_s: float) -> None:
        """End the engine's thread; the engine is the caller's again. Callable from any thread.

        Raises:
            EnvironmentFault: a step takes longer than ``timeout_s``.
        """
        self._loop.stop(timeout_s)

    # In the event loop

    def _require_room(self, num_more: int) -> None:
        if num_more > self._capacity:
            raise ApiError(
                400,
                "invalid_request",
                f"{num_more} choices were asked for at once; this server takes {self._capacity}",
            )
        if self.num_open + num_more > self._capacity:
            raise ApiError(
                429,
                "overloaded",
                f"{self.num_open} answers run or wait, {num_more} more were asked for, "
                f"{self._capacity} are taken at once; ask again later",
            )

    def _post(self, action: Callable[[], None]) -> Future[int]:
        try:
            return self._loop.post(action)
        except Exception as error:  # whatever ended the engine
            raise engine_failed(error) from error

    def _deliver(self, events: Sequence[Event], ended: Sequence[Trajectory]) -> None:
        for event in events:
            if event.request_id in self._open:
                self._open[event.request_id].tell(event)
        for trajectory in ended:
            answer = self._open.pop(f"{trajectory.prompt_id}#{trajectory.rollout}")
            answer.end(trajectory)
            self._on_end(trajectory)
        self._look_whether_idle()

    def _fail_all(self, error: Exception) -> None:
        answers, self._open = list(self._open.values()), {}
        for answer in answers:
            answer.end(None, error)
        self._look_whether_idle()

    def _forget(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self._open.pop(answer.request.request_id, None)
        self._look_whether_idle()

    def _look_whether_idle(self) -> None:
        if not self._open:
            self._is_idle.set()

    # In the engine's thread

    def _add(self, requests: Sequence[GenerationRequest], is_live: bool) -> None:
        problems = [x for request in requests for x in self._engine.problems(request)]
        if problems:
            raise InputError("\n".join(problems))
        for request in requests:
            self._engine.add(request, listener=self._told.append if is_live else None)

    def _abort(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self._engine.unfinished:
                self._engine.abort(name)

    def _hand_over(self, ended: list[Trajectory]) -> None:
        if self._told or ended:
            told, self._told[:] = list(self._told), []
            self._coroutines.call_soon_threadsafe(self._deliver, told, ended)

    def _report_failure(self, error: Exception) -> None:
        self._coroutines.call_soon_threadsafe(self._fail_all, error)
        self._on_failure(error)


def engine_failed(error: Exception) -> ApiError:
    """Return what clients are told when the engine is gone."""
    return ApiError(500, "engine_failed", f"the engine has failed: {error}")


def _raise_nothing(done: Future[int]) -> None:
    """An abort fails only with the engine, which everybody is told of by itself."""
    done.exception()
