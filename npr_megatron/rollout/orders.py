"""What is said between a fleet and its replicas about weights: events in, actions out.

Plain values without behaviour; what follows from them is decided in ``rollout.push``, and done in
``rollout.crew``.
"""

from __future__ import annotations

from dataclasses import dataclass

from npr_megatron.rollout.health import Event, Stamp

# Events. ``stamp`` repeats that of the order answered, so a late answer is told from a due one.


@dataclass(frozen=True, slots=True)
class Pushed:
    """New weights are to be served; their publication can be read."""

    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Staged:
    """A replica holds verified weights (answer to Stage and CatchUp)."""

    replica: int
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Committed:
    """A replica serves ``stamp`` (answer to Commit)."""

    replica: int
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Failed:
    """A replica answered an order with an error."""

    replica: int
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class TimedOut:
    """A replica left its order unanswered beyond the deadline."""

    replica: int


@dataclass(frozen=True, slots=True)
class Answered:
    """A fenced replica serves ``serving``; what it had staged and was told before is void (answer
    to Fence)."""

    replica: int
    serving: Stamp | None


@dataclass(frozen=True, slots=True)
class Noticed:
    """A replica came up, died, fell silent while it owes requests, or progressed with them."""

    replica: int
    event: Event
    """STARTED, DIED, SILENT or PROGRESSED."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """A new process comes up in the seat of a dead replica."""

    replica: int


@dataclass(frozen=True, slots=True)
class SourceLost:
    """Nobody can read the publications any more."""


PushEvent = (
    Pushed | Staged | Committed | Failed | TimedOut | Answered | Noticed | Replaced | SourceLost
)

# Actions.


@dataclass(frozen=True, slots=True)
class Stage:
    """Have ``replica`` copy and verify the pushed weights: Staged or Failed."""

    replica: int
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class CatchUp:
    """Have ``replica`` copy and verify what the fleet serves: Staged or Failed."""

    replica: int
    stamp: Stamp
    peer: int | None
    """Where from; None is the publication."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Have ``replica`` serve what it staged: Committed or Failed."""

    replica: int
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Abort:
    """Have ``replica`` drop what it staged; no answer is needed."""

    replica: int
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Fence:
    """Take ``replica`` out and ask, without waiting, what it serves: Answered."""

    replica: int


@dataclass(frozen=True, slots=True)
class Replace:
    """Kill ``replica``, it cannot be brought back: Noticed DIED, later Replaced."""

    replica: int


Action = Stage | CatchUp | Commit | Abort | Fence | Replace
