"""One living replica per seat: start, keep at the fleet's weights, replace the dead.

The mechanics below ``rollout.fleet``, which decides what is asked. A replacement takes its
predecessor's seat; requests that a lost or fenced replica owes go to others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import ray

from npr_megatron.config.engine import FleetConfig
from npr_megatron.errors import EnvironmentFault, NprError, StaleWeightsError
from npr_megatron.records.request import GenerationRequest
from npr_megatron.rollout.actors import Death, Seat, gather
from npr_megatron.rollout.courier import Courier, stamp_of
from npr_megatron.rollout.health import Event, ReplicaState
from npr_megatron.rollout.member import Deaths, Member
from npr_megatron.rollout.orders import Noticed, Replaced
from npr_megatron.rollout.replica import ReplicaSpec
from npr_megatron.rollout.router import split_requests
from npr_megatron.weights.publication import Publication

logger = logging.getLogger(__name__)

_POLL_S = 0.5


class Crew:
    """The members, in seat order. Every method but ``close`` may replace any of them."""

    def __init__(self, seats: Sequence[Seat], spec: ReplicaSpec, config: FleetConfig) -> None:
        self._seats = tuple(seats)
        self._spec = spec
        self._config = config
        self.members: list[Member] = []
        self.courier = Courier(self.members, len(self._seats), config)
        self.num_restarts = 0

    def start(self) -> None:
        """Bring all members up, at the same time."""
        self.members += [Member(index, seat, self._spec) for index, seat in enumerate(self._seats)]
        self.replace(self._come_up(self.members))

    def close(self) -> None:
        """End all members; safe to call twice."""
        for member in self.members:
            member.kill()
        self.members.clear()

    def require_open(self) -> None:
        """Raise EnvironmentFault unless the crew is at work."""
        if not self.members:
            raise EnvironmentFault(
                "the fleet was asked for work, it has not started or has ended; start a new one"
            )

    def state(self, member: Member) -> ReplicaState:
        """Return the health and weights of a member."""
        return self.courier.swap.replicas[member.index].state

    def notice(self, member: Member, event: Event) -> None:
        """Take note of what happened to a member."""
        self.courier.tell(Noticed(member.index, event))

    @property
    def routable(self) -> list[Member]:
        """Members that serve the fleet's weights and may be given requests."""
        return [m for m in self.members if self.courier.swap.is_routable(m.index)]

    def push(self, publication: Publication) -> None:
        """Bring ``publication`` to every member that can be reached, and replace the dead.

        Raises:
            NprError: nobody could get the weights, for the first reason given.
            EnvironmentFault: nobody answered in time, twice.
        """
        for _ in range(2):
            self._poll_until(lambda: self.courier.swap.is_settled)
            self._guarded(lambda: self.courier.offer(publication))
            self._poll_until(lambda: self.courier.swap.is_settled)
            self.replace({})
            if self.courier.swap.serving == stamp_of(publication):
                self._poll_until(lambda: not self.courier.is_busy)
                self.replace({})
                return
            if self.courier.refusals:
                raise self.courier.refusals[0]
            self._await_engine()
        raise EnvironmentFault(
            f"no replica staged weight version {publication.version} within "
            f"{self._config.push_timeout_s:g} s, twice; raise fleet.push_timeout_s or look at the "
            "load of the node"
        )

    def tend(self) -> None:
        """Take what replicas said meanwhile; replace the dead; hand orphans on if anybody is there.

        Waits for nobody.
        """
        self._guarded(lambda: self.courier.poll(0.0))
        self.replace({})

    def require_routable(self) -> None:
        """Wait until somebody can be given requests.

        Raises:
            StaleWeightsError: the weights the fleet served are nowhere left.
        """
        self.tend()
        while not self.routable:
            swap = self.courier.swap
            if swap.is_lost or not self.courier.is_waiting:
                raise StaleWeightsError(
                    f"weights {swap.serving} are served, no replica holds them any more and their "
                    "publication cannot be read; push again"
                )
            self._guarded(lambda: self.courier.poll(_POLL_S))
            self.replace({})

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

    def submit(self, shares: dict[Member, Sequence[GenerationRequest]]) -> None:
        """Give each member its share, in one message; the dead are replaced."""
        for member, share in shares.items():
            member.pending |= {request.request_id: request for request in share}
            member.progress_s = time.monotonic()
        _, dead = self.ask(
            [member for member, share in shares.items() if share],
            lambda m: m.actor.submit.remote(shares[m]),
            "submitting requests",
        )
        self.replace(dead)

    def replace(self, dead: Deaths) -> None:
        """Replace ``dead`` members, those found dead otherwise, and replacements that die in turn.

        Raises EnvironmentFault, and ends the crew, when that takes more than ``max_restarts``
        replacements in the life of the crew.
        """
        while dead := self._with_found(dead):
            for member, cause in dead.items():
                self._bury(member, cause)
            fresh = [Member(member.index, member.seat, self._spec) for member in dead]
            for member in fresh:
                self.members[member.index] = member
                self.courier.tell(Replaced(member.index))
            dead = self._come_up(fresh)
            self._poll_until(lambda: not self.courier.is_busy)
        self._adopt()

    def _with_found(self, dead: Deaths) -> Deaths:
        found, self.courier.deaths = self.courier.deaths, {}
        return {
            member: cause
            for member, cause in {**found, **dead}.items()
            if self.members[member.index] is member
        }

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
        self.courier.orphan(member)
        self.courier.lose(member)
        member.kill()
        logger.warning("%s was lost: %s; a replacement takes its seat", member.name, cause)

    def _come_up(self, members: Sequence[Member]) -> Deaths:
        """Start engines, each of which then catches up with the fleet; return the deaths."""
        pids, dead = self.ask(
            members,
            lambda m: m.actor.start.remote(),
            "starting an engine",
            self._spec.engine.start_timeout_s,
        )
        for member, pid in pids.items():
            member.pid = pid
            self.notice(member, Event.STARTED)
        return dead

    def _adopt(self) -> None:
        """Give orphans to idle members, or to all; they wait where nobody is routable."""
        routable, orphans = self.routable, self.courier.orphans
        if not orphans or not routable:
            return
        self.courier.orphans = []
        heirs = [member for member in routable if not member.pending] or routable
        self.submit(dict(zip(heirs, split_requests(orphans, len(heirs)), strict=True)))

    def _await_engine(self) -> None:
        """Wait until somebody can be given orders: a fenced member answers, or is replaced."""
        while not any(self.state(member).has_engine for member in self.members):
            self._guarded(lambda: self.courier.poll(_POLL_S))
            self.replace({})

    def _poll_until(self, is_done: Callable[[], bool]) -> None:
        """Poll until ``is_done``; every order on its way has a deadline, so this ends."""
        while not is_done():
            self._guarded(lambda: self.courier.poll(_POLL_S))

    def _guarded(self, act: Callable[[], None]) -> None:
        """Run ``act``; an error is that of a broken engine and ends the crew."""
        try:
            act()
        except NprError:
            self.close()
            raise


def owed(members: Iterable[Member]) -> list[Member]:
    """Return the members that owe requests."""
    return [member for member in members if member.pending]
