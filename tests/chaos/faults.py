"""What goes wrong in a case: drawn from its seed alone, before anything runs."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """What can happen to a process or to what it wrote."""

    KILL = "kill"  # SIGKILL; whoever watches starts another in its place
    STOP = "stop"  # SIGSTOP, SIGCONT after ``lasting_s``: beyond the deadline, or a mere delay
    CORRUPT = "corrupt"  # a bit of an arena flips
    FULL = "full"  # a trainer rank restarts with no room for its arena
    REORDER = "reorder"  # orders arrive late, twice, and behind younger ones


class Victim(StrEnum):
    """Who is hit."""

    SOURCE = "source"
    REPLICA = "replica"
    COORDINATOR = "coordinator"


_POSSIBLE = {
    Fault.KILL: tuple(Victim),
    Fault.STOP: tuple(Victim),
    Fault.CORRUPT: (Victim.SOURCE,),
    Fault.FULL: (Victim.SOURCE,),
    Fault.REORDER: (Victim.COORDINATOR,),
}


@dataclass(frozen=True, slots=True)
class Blow:
    """One fault."""

    at_s: float
    """After the first push began."""
    fault: Fault
    victim: Victim
    index: int
    """Which replica or trainer rank, modulo their number."""
    lasting_s: float


def blows_of(seed: int) -> list[Blow]:
    """Return one to three faults, in the order in which they strike."""
    chance = random.Random(seed)
    blows: list[Blow] = []
    for _ in range(chance.choice((1, 1, 2, 3))):
        fault = chance.choice(tuple(Fault))
        blows.append(
            Blow(
                at_s=chance.uniform(0.0, 0.12),
                fault=fault,
                victim=chance.choice(_POSSIBLE[fault]),
                index=chance.randrange(6),
                lasting_s=chance.choice((0.02, 0.1, 0.8)),
            )
        )
    return sorted(blows, key=lambda blow: blow.at_s)
