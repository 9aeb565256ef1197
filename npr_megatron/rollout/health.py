"""One replica as a pure state machine: no clock, no Ray, every event is given.

::

    STARTING --started--> CATCHING_UP --caught_up--> HEALTHY <--progressed-- SUSPECT
                          CATCHING_UP <--outdated--- HEALTHY ----silent----> SUSPECT
                          CATCHING_UP <--answered--- FENCED  <---fenced----- (any with an engine)
    (any but DEAD) --died--> DEAD

Invariants: DEAD is final (a replacement is a new machine that starts at STARTING); nothing becomes
HEALTHY without having caught up with a version; only a HEALTHY replica that serves the fleet's
weights is routable, so no request is ever answered by weights that nobody asked for. What a replica
has to do in a push is decided one level up (``rollout.push``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


@dataclass(frozen=True, slots=True, order=True)
class Stamp:
    """Which weights: equal stamps, equal bytes."""

    version: int
    digest: int
    """Layout-independent (``weights.digest``)."""


class Health(StrEnum):
    """What the fleet believes about a replica."""

    STARTING = "starting"  # the process comes up, no engine yet
    CATCHING_UP = "catching_up"  # an engine without the fleet's weights
    HEALTHY = "healthy"  # serves what it last committed
    SUSPECT = "suspect"  # owes progress for too long; keeps its requests, gets no new ones
    FENCED = "fenced"  # left an order unanswered or failed it; gets nothing until it answers
    DEAD = "dead"  # gone or given up; a replacement takes its seat


class Event(StrEnum):
    """What happened to a replica."""

    STARTED = "started"
    CAUGHT_UP = "caught_up"
    OUTDATED = "outdated"
    SILENT = "silent"
    PROGRESSED = "progressed"
    FENCED = "fenced"
    ANSWERED = "answered"
    DIED = "died"


_NEXT = MappingProxyType(
    {
        (Health.STARTING, Event.STARTED): Health.CATCHING_UP,
        (Health.STARTING, Event.DIED): Health.DEAD,
        (Health.CATCHING_UP, Event.CAUGHT_UP): Health.HEALTHY,
        (Health.CATCHING_UP, Event.FENCED): Health.FENCED,
        (Health.CATCHING_UP, Event.DIED): Health.DEAD,
        (Health.HEALTHY, Event.CAUGHT_UP): Health.HEALTHY,
        (Health.HEALTHY, Event.OUTDATED): Health.CATCHING_UP,
        (Health.HEALTHY, Event.SILENT): Health.SUSPECT,
        (Health.HEALTHY, Event.PROGRESSED): Health.HEALTHY,
        (Health.HEALTHY, Event.FENCED): Health.FENCED,
        (Health.HEALTHY, Event.DIED): Health.DEAD,
        (Health.SUSPECT, Event.CAUGHT_UP): Health.HEALTHY,
        (Health.SUSPECT, Event.OUTDATED): Health.CATCHING_UP,
        (Health.SUSPECT, Event.SILENT): Health.SUSPECT,
        (Health.SUSPECT, Event.PROGRESSED): Health.HEALTHY,
        (Health.SUSPECT, Event.FENCED): Health.FENCED,
        (Health.SUSPECT, Event.DIED): Health.DEAD,
        (Health.FENCED, Event.ANSWERED): Health.CATCHING_UP,
        (Health.FENCED, Event.DIED): Health.DEAD,
    }
)


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """Health and weights of one replica; every change returns a new state."""

    health: Health = Health.STARTING
    serving: Stamp | None = None
    """What it last said it serves; None before the first."""

    def after(self, event: Event, *, serving: Stamp | None = None) -> ReplicaState:
        """Return the state after ``event``; ``serving`` is what a CAUGHT_UP replica now serves.

        Raises ValueError on a transition that the machine does not have: our own bug, never the
        replica's.
        """
        following = _NEXT.get((self.health, event))
        if following is None:
            raise ValueError(f"a {self.health} replica cannot have the event {event}")
        if (serving is not None) != (event is Event.CAUGHT_UP):
            raise ValueError("a stamp belongs to CAUGHT_UP and to nothing else")
        kept = self.serving if serving is None else serving
        return dataclasses.replace(self, health=following, serving=kept)

    @property
    def has_engine(self) -> bool:
        """Whether orders may be sent there."""
        return self.health in (Health.CATCHING_UP, Health.HEALTHY, Health.SUSPECT)

    def is_routable(self, fleet: Stamp | None) -> bool:
        """Return whether new requests may go there while the fleet serves ``fleet``."""
        return self.health is Health.HEALTHY and self.serving == fleet


def judge_silence(silent_s: float, timeout_s: float) -> Event | None:
    """Return what ``silent_s`` seconds without owed progress mean, or None for nothing yet.

    A replica is suspect after a quarter of ``timeout_s`` and given up after all of it.
    """
    if silent_s >= timeout_s:
        return Event.DIED
    return Event.SILENT if silent_s >= timeout_s / 4 else None
