"""The health of one replica as a pure state machine: no clock, no Ray, every event is given.

::

    STARTING --ready--> CATCHING_UP --caught_up--> HEALTHY --silent--> SUSPECT
                                                   HEALTHY <--progressed, caught_up-- SUSPECT
    (any but DEAD) --died--> DEAD

Invariants: DEAD is final (a replacement is a new machine that starts at STARTING); nothing becomes
    HEALTHY
without having caught up with a version; only a HEALTHY replica that serves the fleet's version is
routable, so no request is ever answered by weights that nobody asked for.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Health(StrEnum):
    """What the fleet believes about a replica."""

    STARTING = "starting"  # the process comes up, no engine yet
    CATCHING_UP = "catching_up"  # an engine without the fleet's weights
    HEALTHY = "healthy"  # serves the version it last committed
    SUSPECT = "suspect"  # owes progress for too long; keeps its requests, gets no new ones
    DEAD = "dead"  # gone or given up; a replacement takes its seat


class Event(StrEnum):
    """What happened to a replica."""

    READY = "ready"
    CAUGHT_UP = "caught_up"
    SILENT = "silent"
    PROGRESSED = "progressed"
    DIED = "died"


_NEXT = MappingProxyType(
    {
        (Health.STARTING, Event.READY): Health.CATCHING_UP,
        (Health.CATCHING_UP, Event.CAUGHT_UP): Health.HEALTHY,
        (Health.HEALTHY, Event.CAUGHT_UP): Health.HEALTHY,
        (Health.HEALTHY, Event.PROGRESSED): Health.HEALTHY,
        (Health.HEALTHY, Event.SILENT): Health.SUSPECT,
        (Health.SUSPECT, Event.SILENT): Health.SUSPECT,
        (Health.SUSPECT, Event.PROGRESSED): Health.HEALTHY,
        (Health.SUSPECT, Event.CAUGHT_UP): Health.HEALTHY,
        (Health.STARTING, Event.DIED): Health.DEAD,
        (Health.CATCHING_UP, Event.DIED): Health.DEAD,
        (Health.HEALTHY, Event.DIED): Health.DEAD,
        (Health.SUSPECT, Event.DIED): Health.DEAD,
    }
)


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """Health and weights of one replica; every change returns a new state."""

    health: Health = Health.STARTING
    version: int = -1
    """Weight version it serves; -1 before the first."""

    def after(self, event: Event, *, version: int | None = None) -> ReplicaState:
        """Return the state after ``event``; ``version`` is the one a CAUGHT_UP replica now serves.

        Raises ValueError on a transition that the machine does not have: our own bug, never the
        replica's.
        """
        following = _NEXT.get((self.health, event))
        if following is None:
            raise ValueError(f"a {self.health} replica cannot have the event {event}")
        if (version is not None) != (event is Event.CAUGHT_UP):
            raise ValueError("a version belongs to CAUGHT_UP and to nothing else")
        served = self.version if version is None else version
        return dataclasses.replace(self, health=following, version=served)

    def is_routable(self, fleet_version: int) -> bool:
        """Return whether new requests may go there."""
        return self.health is Health.HEALTHY and self.version == fleet_version


def judge_silence(silent_s: float, timeout_s: float) -> Event | None:
    """Return what ``silent_s`` seconds without owed progress mean, or None for nothing yet.

    A replica is suspect after a quarter of ``timeout_s`` and given up after all of it.
    """
    if silent_s >= timeout_s:
        return Event.DIED
    return Event.SILENT if silent_s >= timeout_s / 4 else None
