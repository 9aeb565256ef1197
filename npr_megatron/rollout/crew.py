"""One living replica per seat: start, ask all at once, replace the dead.

The mechanics below ``rollout.fleet``, which decides what is asked. A replacement takes over its
predecessor's seat and unfinished requests, after it has staged, verified and committed the
publication the crew serves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import ray

from npr_megatron.config.engine import FleetConfig
from npr_megatron.errors import EnvironmentFault
from npr_megatron.records.request import GenerationRequest
from npr_megatron.rollout.actors import Death, Seat, gather
from npr_megatron.rollout.health import Event, ReplicaState, Stamp
from npr_megatron.rollout.replica import CALL_THREADS, Replica, ReplicaSpec
from npr_megatron.weights.publication import Publication

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 300.0
"""To import torch and build an engine: long on a busy machine, whatever a request may take."""


class Member:
    """The driver's view of the replica in one seat."""

    def __init__(self, index: int, seat: Seat, spec: ReplicaSpec) -> None:
        self.index = index
        self.seat = seat
        self.state = ReplicaState()
        self.pid: int | None = None
        self.pending: dict[str, GenerationRequest] = {}
        """Requests it owes, by id."""
        self.report: ray.ObjectRef | None = None
        """The report that is on its way."""
        self.num_steps = 0
        self.progress_s = time.monotonic()
        """When it last made progress, or was given work."""
        options = seat.options(max_concurrency=CALL_THREADS)
        self.actor: Any = ray.remote(Replica).options(**options).remote(spec)

    @property
    def name(self) -> str:
        """How people know it."""
        return f"replica {self.index} (pid {self.pid})"


Deaths = dict[Member, str]
"""Members that are gone or given up, each with the cause in one line."""


class Crew:
    """The members, in seat order. :meth:`recover` may replace any of them."""

    def __init__(self, seats: Sequence[Seat], spec: ReplicaSpec, config: FleetConfig) -> None:
        self._seats = tuple(seats)
        self._spec = spec
        self._config = config
        self.members: list[Member] = []
        self.publication: Publication | None = None
        """What every member must serve; set by the fleet once it is committed."""
        self.num_restarts = 0

    def start(self) -> None:
        """Bring all members up, at the same time."""
        self.members = [Member(index, seat, self._spec) for index, seat in enumerate(self._seats)]
        self.recover(self._come_up(self.members))

    def close(self) -> None:
        """End all members; safe to call twice."""
        for member in self.members:
            ray.kill(member.actor)
        self.members = []

    def require_open(self) -> None:
        """Raise EnvironmentFault unless the crew is at work."""
        if not self.members:
            raise EnvironmentFault(
                "the fleet was asked for work, it has not started or has ended; start a new one"
            )

    def ask(
        self,
        members: Collection[Member],
        ask: Callable[[Member], ray.ObjectRef],
        what: str,
        timeout_s: float | None = None,
    ) -> tuple[dict[Member, Any], Deaths]:
        """Call all ``members`` at once; return the answers and the deaths.

        Raises the first error, in its own type; EnvironmentFault (an engine broke) ends the crew.
        """
        calls = [ask(member) for member in members]
        limit_s = self._config.request_timeout_s if timeout_s is None else timeout_s
        try:
            results = gather(calls, timeout_s=limit_s, what=what)
        except EnvironmentFault:
            self.close()
            raise
        answers = dict(zip(members, results, strict=True))
        dead = {m: answer.cause for m, answer in answers.items() if isinstance(answer, Death)}
        return {m: answer for m, answer in answers.items() if m not in dead}, dead

    def submit(self, members: Iterable[Member]) -> Deaths:
        """Send each member what it owes, in one message; return the deaths."""
        busy = [member for member in members if member.pending]
        _, dead = self.ask(
            busy, lambda m: m.actor.submit.remote(list(m.pending.values())), "submitting requests"
        )
        for member in busy:
            member.progress_s = time.monotonic()
        return dead

    def recover(self, dead: Deaths) -> None:
        """Replace ``dead`` members, and the replacements that die in turn.

        Raises EnvironmentFault, and ends the crew, when that takes more than ``max_restarts``
        replacements in the life of the crew.
        """
        while dead:
            for member, cause in dead.items():
                self._bury(member, cause)
            fresh = [self._replace(member) for member in dead]
            dead = self._come_up(fresh)

    def _bury(self, member: Member, cause: str) -> None:
        if self.num_restarts >= self._config.max_restarts:
            self.close()
            raise EnvironmentFault(
                f"{member.name} was lost ({cause}) after {self.num_restarts} replacements, "
                "fleet.max_restarts is "
                f"{self._config.max_restarts}; look for memory pressure on the node, or raise "
                "max_restarts"
            )
        self.num_restarts += 1
        member.state = member.state.after(Event.DIED)
        ray.kill(member.actor)
        logger.warning("%s was lost: %s; a replacement takes its seat", member.name, cause)

    def _replace(self, member: Member) -> Member:
        fresh = Member(member.index, member.seat, self._spec)
        fresh.pending = member.pending
        self.members[member.index] = fresh
        return fresh

    def _come_up(self, members: Sequence[Member]) -> Deaths:
        """Start engines, bring them to the served version, hand over what they owe; return the
        deaths."""
        pids, dead = self.ask(
            members, lambda m: m.actor.start.remote(), "starting an engine", _START_TIMEOUT_S
        )
        for member, pid in pids.items():
            member.pid = pid
            member.state = member.state.after(Event.STARTED)
        publication = self.publication
        if publication is None:
            return dead
        staged, more = self.ask(pids, lambda m: m.actor.stage.remote(publication), "catching up")
        dead |= more
        caught_up, more = self.ask(
            staged, lambda m: m.actor.commit.remote(publication.version), "catching up"
        )
        stamp = Stamp(publication.version, publication.digest)
        for member in caught_up:
            member.state = member.state.after(Event.CAUGHT_UP, serving=stamp)
        return dead | more | self.submit(caught_up)
