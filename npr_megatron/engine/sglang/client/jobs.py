"""What the conductor works on: requests to decode, and finished trajectories to score."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.events import Event, Watcher
from npr_megatron.engine.flow.flow import Flow
from npr_megatron.engine.sglang.client.driver import Desk, Driver
from npr_megatron.engine.sglang.client.reservations import scoring_slots
from npr_megatron.engine.sglang.client.routes import RouteBook
from npr_megatron.engine.sglang.client.rows import recorded_runs
from npr_megatron.engine.sglang.client.scorer import Scorer
from npr_megatron.engine.sglang.client.stops import Stops
from npr_megatron.engine.sglang.client.thread import News
from npr_megatron.records.trajectory import FinishReason, FloatArray, Trajectory


@dataclass(slots=True)
class Era:
    """Which keys and values may be shared with lives that begin now."""

    version: int
    """Of the live weights."""
    num_distrusts: int = 0
    """How often those of before were given up, for new weights or without."""

    @property
    def name(self) -> str:
        """Prefix of every namespace."""
        return f"{self.version}.{self.num_distrusts}"

    def turn(self, version: int) -> None:
        """Begin anew with other weights; their version may be one that was live before."""
        self.version = version
        self.num_distrusts += 1


class FlowJob:
    """A request that is decoded.

    Args:
        age: number of its arrival.
        num_slots: its worst case.
        post: takes its news.
        routed: the model whose experts are to be recorded; None records none.
    """

    def __init__(
        self,
        flow: Flow,
        desk: Desk,
        stops: Stops,
        era: Era,
        *,
        age: int,
        num_slots: int,
        post: Callable[[News], None],
        listener: Callable[[Event], None] | None,
        routed: ModelConfig | None = None,
    ) -> None:
        self.flow = flow
        self.age = age
        self.num_slots = num_slots
        self.deadline: asyncio.TimerHandle | None = None
        self._desk = desk
        self._stops = stops
        self._era = era
        self._post = post
        self._listener = listener
        self._watcher = Watcher()
        self._driver: Driver | None = None
        self._routed = routed
        self._book = None if routed is None else RouteBook(routed)

    @property
    def prompt(self) -> tuple[int, ...]:
        """What it shares with others."""
        return self.flow.request.prompt_ids

    @property
    def is_watched(self) -> bool:
        """Whether somebody wants every token at once."""
        return self._listener is not None

    @property
    def is_done(self) -> bool:
        """Whether the trajectory has ended."""
        return self.flow.finish is not None

    @property
    def progress(self) -> int:
        """Tokens that the flow has accepted."""
        return self.flow.ledger.total

    @property
    def num_held(self) -> int:
        """Tokens whose keys and values it needs while it runs."""
        return self.flow.usage.resident_kv

    def live(self, name: str) -> Driver:
        """Return the driver of its next life."""
        before = self._driver
        self._driver = Driver(
            self.flow,
            self._desk,
            self._stops,
            name=name,
            namespace=f"{self._era.name}/{self._structure(name)}",
            version=self._era.version,
            received={} if before is None else before.left_over,
            book=self._book,
        )
        return self._driver

    def enter(self, version: int) -> None:
        """Go on under new weights from where it is."""
        if self._driver is not None:
            self._driver.version = version

    def start_again(self) -> None:
        """Forget what was generated; to be followed by a new life."""
        if self.flow.ledger.total:
            self.flow = self.flow.anew()
        self._driver = None
        self._book = None if self._routed is None else RouteBook(self._routed)

    def end(self, reason: FinishReason) -> None:
        """End the trajectory if it has not ended."""
        self.flow.finish = self.flow.finish or reason

    def look(self) -> None:
        """Post what happened since the last look."""
        flow, request_id = self.flow, self.flow.request.request_id
        events: list[Event] = []
        if self._listener is not None:
            events = self._watcher.news(flow, self._era.version)
        if flow.finish is not None:
            if flow.finish is FinishReason.FAILED:
                self._era.num_distrusts += 1
            if self.deadline is not None:
                self.deadline.cancel()
            routes = None if self._book is None else self._book.routes(flow)
            self._post(News(request_id, self._listener, events, flow.trajectory(routes)))
        elif events:
            self._post(News(request_id, self._listener, events, None))

    def _structure(self, name: str) -> str:
        """Return what makes keys and values a function of the text, within a namespace.

        Text behind a prompt of known length has one structure, as long as every closed guideline is
        followed by a fork. Where one had no room and the text went on plainly, nothing is shared
        but by those that never fork.
        """
        flow = self.flow
        if not flow.is_plain:
            return f"{len(flow.request.prompt_ids)}"
        return "plain" if flow.cursor.block == 0 else f"plain {name}"


class ScoreJob:
    """A finished trajectory that is scored.

    Raises:
        InputError: it does not fit the pool, or is not laid out canonically.
    """

    def __init__(
        self, trajectory: Trajectory, desk: Desk, config: EngineConfig, *, age: int
    ) -> None:
        self.age = age
        self.num_slots = scoring_slots(trajectory, config)
        self.done = asyncio.Event()
        """Set when every token is scored."""
        self._trajectory = trajectory
        self._runs = recorded_runs(trajectory)
        self._desk = desk
        self._scorer: Scorer | None = None

    @property
    def logprobs(self) -> FloatArray:
        """[T] when it is done."""
        assert self._scorer is not None, "asked for when it is done"
        return self._scorer.logprobs

    @property
    def prompt(self) -> tuple[int, ...]:
        """What it shares with others."""
        return tuple(self._trajectory.token_ids[: self._trajectory.prompt_length].tolist())

    @property
    def is_watched(self) -> bool:
        """Whether somebody wants every token at once."""
        return False

    @property
    def is_done(self) -> bool:
        """Whether every token is scored."""
        return self._scorer is not None and self._scorer.is_done

    @property
    def progress(self) -> int:
        """Nothing is kept from one life to the next."""
        return 0

    @property
    def num_held(self) -> int:
        """Tokens whose keys and values it needs while it runs."""
        return len(self._trajectory.token_ids)

    def live(self, name: str) -> Scorer:
        """Return the scorer of its next life."""
        self._scorer = Scorer(self._trajectory, self._runs, self._desk, name=name)
        return self._scorer

    def look(self) -> None:
        """Tell if all is scored."""
        if self.is_done:
            self.done.set()
