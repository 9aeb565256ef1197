"""A strict listener: what it is told of a trajectory must rebuild the trajectory, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from npr_megatron.engine.events import (
    Event,
    FinishEvent,
    ForkEvent,
    JoinEvent,
    RestartEvent,
    TokenEvent,
)
from npr_megatron.engine.flow.flow import Teacher
from npr_megatron.engine.interface import Engine
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import Trajectory

STREAMS = (
    "token_ids",
    "position_ids",
    "block",
    "branch",
    "forced",
    "logprobs",
    "weight_versions",
)


@dataclass
class Replay:
    """What a listener can rebuild; it checks the order as it goes."""

    request_id: str
    pieces: list[list[list[TokenEvent]]] = field(default_factory=lambda: [[[]]])
    """Trunk pieces and blocks in turn, each a list of streams."""
    trajectory: Trajectory | None = None
    num_restarts: int = 0

    def take(self, event: Event) -> None:
        assert event.request_id == self.request_id
        assert self.trajectory is None, "told something behind the end"
        match event:
            case TokenEvent():
                self.take_token(event)
            case ForkEvent():
                assert len(self.pieces) % 2 == 1
                assert event.block == len(self.pieces) // 2 + 1
                self.pieces.append([[] for _ in range(event.num_branches)])
            case JoinEvent():
                assert len(self.pieces) % 2 == 0
                assert event.block == len(self.pieces) // 2
                self.pieces.append([[]])
            case RestartEvent():
                self.pieces = [[[]]]
                self.num_restarts += 1
            case FinishEvent():
                self.trajectory = event.trajectory
                assert event.usage.total == event.trajectory.num_tokens
                assert event.usage.resident_kv < len(event.trajectory.token_ids)

    def take_token(self, event: TokenEvent) -> None:
        is_forked = len(self.pieces) % 2 == 0
        assert event.block == (len(self.pieces) // 2 if is_forked else 0)
        assert (event.branch > 0) == is_forked
        own = self.pieces[-1][max(event.branch - 1, 0)]
        before = len(own) if is_forked else sum(len(trunk) for (trunk,) in self.pieces[::2])
        assert event.index == before
        own.append(event)

    def linear(self) -> list[TokenEvent]:
        return [event for streams in self.pieces for stream in streams for event in stream]

    def assert_rebuilds(self, trajectory: Trajectory) -> None:
        names = ("token_id", "position", "block", "branch", "forced", "logprob", "weight_version")
        response = slice(trajectory.prompt_length, None)
        for stream, name in zip(STREAMS, names, strict=True):
            recorded = getattr(trajectory, stream)[response]
            told = np.array([getattr(event, name) for event in self.linear()], recorded.dtype)
            np.testing.assert_array_equal(told, recorded, err_msg=stream)


def listen(engine: Engine, request: GenerationRequest, teacher: Teacher | None = None) -> Replay:
    """Add ``request`` and listen to it."""
    replay = Replay(request.request_id)
    engine.add(request, teacher, listener=replay.take)
    return replay


def assert_told(replays: Sequence[Replay], finished: Sequence[Trajectory]) -> None:
    """What was told of each trajectory is what it records, to the end."""
    ended = {f"{t.prompt_id}#{t.rollout}": t for t in finished}
    for replay in replays:
        trajectory = ended[replay.request_id]
        replay.assert_rebuilds(trajectory)
        assert replay.trajectory is not None
        assert replay.trajectory.to_json() == trajectory.to_json()
