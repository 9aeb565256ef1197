"""What a trajectory tells while it grows: tokens, forks, joins, a new start, the end.

Events are read off a flow's segments after a step, so a flow nobody listens to costs nothing. Each
token is told once: the tokens of a move are computed in the pass that follows it, so between two
steps every token has its final log-prob, and preemption and replay change no token that was told.

Told in order, per request: the tokens of each stream; a fork before the tokens of its branches; a
join behind the last of them and before the takeaway; the end last. Replaying the events therefore
rebuilds the streams of the trajectory. A restart makes everything told before it void.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from npr_megatron.engine.flow.flow import Flow
from npr_megatron.engine.flow.ledger import Usage
from npr_megatron.engine.flow.segment import Segment
from npr_megatron.records.trajectory import Trajectory


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token and what the trajectory records of it."""

    request_id: str
    block: int
    """1-based parallel block of a branch token; 0 on the trunk."""
    branch: int
    """1-based branch inside the block; 0 on the trunk."""
    index: int
    """Place in its stream, from 0; the trunk is one stream over all its pieces."""
    token_id: int
    position: int
    forced: bool
    logprob: float
    weight_version: int


@dataclass(frozen=True, slots=True)
class ForkEvent:
    """The trunk pauses; the branches of ``block`` grow."""

    request_id: str
    block: int
    num_branches: int


@dataclass(frozen=True, slots=True)
class JoinEvent:
    """The branches of ``block`` have ended; the trunk goes on."""

    request_id: str
    block: int


@dataclass(frozen=True, slots=True)
class RestartEvent:
    """New weights made the request start again from its prompt: what was told before is void."""

    request_id: str
    weight_version: int
    """Version it starts again under."""


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """Nothing more will be told of this request."""

    request_id: str
    trajectory: Trajectory
    usage: Usage
    """What it has taken. Nothing is given back before the end, so this is the most it ever held."""


Event = TokenEvent | ForkEvent | JoinEvent | RestartEvent | FinishEvent


class Watcher:
    """Remembers how much of one request was told.

    Example, after every step::

        for event in watcher.news(flow, engine.weight_version):
            listener(event)
    """

    __slots__ = ("_first", "_flow", "_is_finished", "_num_on_trunk", "_num_told")

    def __init__(self) -> None:
        self._flow: Flow | None = None
        self._is_finished = False
        self._first = 0
        """Index of the first segment of the stage that is being told: a piece of the trunk, or the
        branches of one block."""
        self._num_told: list[int] = []
        """Per segment of that stage."""
        self._num_on_trunk = 0

    def news(self, flow: Flow, weight_version: int) -> list[Event]:
        """Return what happened since the last call, in order; nothing once the end was told.

        Args:
            flow: the request as it stands between two steps; another object than last time means
                that it was started again.
            weight_version: version of the live weights.
        """
        if self._is_finished:
            return []
        events: list[Event] = []
        request_id = flow.request.request_id
        if flow is not self._flow:
            if self._num_on_trunk:
                events.append(RestartEvent(request_id, weight_version))
            self._flow = flow
            self._first, self._num_on_trunk = 0, 0
            self._num_told = [len(flow.request.prompt_ids)]
        self._tell_stages(flow, events)
        if flow.finish is not None:
            self._is_finished = True
            events.append(FinishEvent(request_id, flow.trajectory(), flow.usage))
        return events

    def _tell_stages(self, flow: Flow, events: list[Event]) -> None:
        while True:
            stage, following = _stages(flow.segments, self._first)
            for place, segment in enumerate(stage):
                self._tell_tokens(flow, segment, self._num_told[place], events)
                self._num_told[place] = len(segment.token_ids)
            if not following:
                return
            request_id, block = flow.request.request_id, following[0].block
            if block:
                events.append(ForkEvent(request_id, block, len(following)))
            else:
                events.append(JoinEvent(request_id, stage[0].block))
            self._first += len(stage)
            self._num_told = [0] * len(following)

    def _tell_tokens(self, flow: Flow, segment: Segment, start: int, events: list[Event]) -> None:
        stop = len(segment.token_ids)
        offset = 0 if segment.branch else self._num_on_trunk - start
        for index in range(start, stop):
            event = TokenEvent(
                flow.request.request_id,
                segment.block,
                segment.branch,
                index + offset,
                segment.token_ids[index],
                segment.position_ids[index],
                segment.forced[index],
                segment.logprobs[index],
                segment.weight_versions[index],
            )
            events.append(event)
        if not segment.branch:
            self._num_on_trunk += stop - start


def _stages(segments: Sequence[Segment], first: int) -> tuple[list[Segment], list[Segment]]:
    """Return the stage that begins at ``first``, and the one behind it (empty if there is none)."""
    stages: list[list[Segment]] = [[], []]
    block, place = segments[first].block, 0
    for segment in itertools.islice(segments, first, None):
        if segment.block != block:
            block, place = segment.block, place + 1
        if place == len(stages):
            break
        stages[place].append(segment)
    return stages[0], stages[1]
