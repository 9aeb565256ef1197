"""Carries out what ``rollout.push`` orders: calls to replicas out, their answers in as events.

Nothing waits for a replica here but ``poll``, and ``poll`` waits no longer than the nearest
deadline: who does not answer an order about weights within ``push_timeout_s`` is reported as timed
out, who does not answer its fence within ``request_timeout_s`` as dead. Who is dead is only listed
(``deaths``); ``rollout.crew`` replaces.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

import ray

from npr_megatron.config.engine import FleetConfig
from npr_megatron.errors import NprError
from npr_megatron.records.request import GenerationRequest
from npr_megatron.rollout.actors import Death, Failure, outcome
from npr_megatron.rollout.health import Event, Stamp
from npr_megatron.rollout.member import Deaths, Member
from npr_megatron.rollout.orders import (
    Abort,
    Action,
    Answered,
    CatchUp,
    Commit,
    Committed,
    Failed,
    Fence,
    Noticed,
    Pushed,
    PushEvent,
    Replace,
    Stage,
    Staged,
    TimedOut,
)
from npr_megatron.rollout.push import Part, Swap
from npr_megatron.weights.publication import Publication

logger = logging.getLogger(__name__)

_LAST_REPORT_S = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class _Errand:
    """A call on its way, and the order it serves."""

    order: Stage | CatchUp | Commit | Fence
    asked: Member
    """Who answers the call: the order's replica, or the peer that is to lend."""
    deadline_s: float
    borrower: Member | None = None
    """For whom ``asked`` is to lend."""
    lender: Member | None = None
    """Whose loan ``asked`` reads."""
    loan: str = ""
    """The loan's name, where there is one."""


class Courier:
    """The swap of one fleet, driven.

    Args:
        members: the processes, in seat order; the crew puts replacements in their places.
    """

    def __init__(self, members: list[Member], num_seats: int, config: FleetConfig) -> None:
        self._members = members
        self._config = config
        self._errands: dict[ray.ObjectRef, _Errand] = {}
        self._offered: Publication | None = None
        self.swap = Swap.of(num_seats)
        self.publication: Publication | None = None
        """What the fleet serves."""
        self.deaths: Deaths = {}
        """Members lost or given up since somebody took the list."""
        self.refusals: list[NprError] = []
        """Why replicas could not stage the last push."""
        self.orphans: list[GenerationRequest] = []
        """Requests whose replica was lost or fenced, until the crew hands them on."""

    @property
    def is_busy(self) -> bool:
        """Whether an order about weights is on its way; a fence is not waited for."""
        return any(not isinstance(errand.order, Fence) for errand in self._errands.values())

    @property
    def is_waiting(self) -> bool:
        """Whether anything at all is on its way."""
        return bool(self._errands)

    def offer(self, publication: Publication) -> None:
        """Begin the push of ``publication``; :meth:`poll` until the swap is settled."""
        self._offered, self.refusals = publication, []
        self.tell(Pushed(stamp_of(publication)))

    def tell(self, event: PushEvent) -> None:
        """Take an event and carry out what follows from it."""
        before = self.swap.serving
        self.swap, actions = self.swap.after(event)
        if self.swap.serving != before:
            self.publication = self._offered
        for action in actions:
            self._carry_out(action)

    def lose(self, member: Member) -> None:
        """Take note that the process of ``member`` is gone: nothing of it will arrive."""
        if self._members[member.index] is member:  # else another sits there already
            self._forget_orders_to(member)
            self.tell(Noticed(member.index, Event.DIED))

    def orphan(self, member: Member) -> None:
        """Take away what ``member`` owes."""
        self.orphans += member.pending.values()
        member.pending = {}

    def poll(self, wait_s: float) -> None:
        """Take the answers that are there, waiting up to ``wait_s`` for the first one."""
        if not self._errands:
            return
        nearest_s = min(errand.deadline_s for errand in self._errands.values()) - time.monotonic()
        ray.wait(list(self._errands), num_returns=1, timeout=max(0.0, min(wait_s, nearest_s)))
        calls = list(self._errands)
        ready, _ = ray.wait(calls, num_returns=len(calls), timeout=0)
        for call in ready:
            if call in self._errands:  # an earlier answer may have settled this one
                errand = self._errands.pop(call)
                self._arrived(errand, outcome(call, f"weights on {errand.asked.name}"))
        now_s = time.monotonic()
        for call, errand in list(self._errands.items()):
            if errand.deadline_s <= now_s and call in self._errands:
                del self._errands[call]
                self._expired(errand)

    def _carry_out(self, action: Action) -> None:
        member = self._members[action.replica]
        match action:
            case Stage():
                self._send(action, member, member.actor.stage.remote(self._offered, member.term))
            case CatchUp(_, _, peer):
                if peer is None:
                    call = member.actor.stage.remote(self.publication, member.term)
                    self._send(action, member, call)
                else:
                    self._borrow(action, self._members[peer])
            case Commit(_, stamp):
                self._send(action, member, member.actor.commit.remote(stamp, member.term))
            case Abort(_, stamp):
                member.actor.drop_staged.remote(stamp)
            case Fence():
                self._forget_orders_to(member)
                self.orphan(member)  # now: it drops them as soon as it hears of the fence
                logger.warning("%s is fenced: it did not do what it was told", member.name)
                self._send(action, member, member.actor.settle.remote())
            case Replace():
                self.deaths[member] = "its weights cannot be brought back to those of the fleet"
            case _:
                assert_never(action)

    def _send(
        self,
        order: Stage | CatchUp | Commit | Fence,
        asked: Member,
        call: ray.ObjectRef,
        *,
        borrower: Member | None = None,
        lender: Member | None = None,
        loan: str = "",
    ) -> None:
        config = self._config
        patience = config.request_timeout_s if isinstance(order, Fence) else config.push_timeout_s
        deadline_s = time.monotonic() + patience
        self._errands[call] = _Errand(order, asked, deadline_s, borrower, lender, loan)

    def _borrow(self, order: CatchUp, peer: Member) -> None:
        assert self.publication is not None, "only what is served is caught up with"
        loan, call = peer.lend(str(Path(self.publication.arena_paths[0]).parent))
        self._send(order, peer, call, borrower=self._members[order.replica], loan=loan)

    def _arrived(self, errand: _Errand, answer: Any) -> None:
        _end_loan(errand.lender, errand.loan)
        if isinstance(answer, Failure) and not (answer.is_ours and _may_fail(errand.order)):
            raise answer.error
        if isinstance(answer, Death):
            self.deaths[errand.asked] = answer.cause
            self.lose(errand.asked)
        if errand.borrower is not None:
            self._arrived_from_lender(errand, errand.borrower, answer)
        elif not isinstance(answer, Death):
            self._arrived_from_replica(errand.order, errand.asked, answer)

    def _arrived_from_lender(self, errand: _Errand, borrower: Member, answer: Any) -> None:
        """A loan is ready, or will not come: have the borrower read it if it still wants to."""
        order = errand.order
        assert isinstance(order, CatchUp), "only who catches up borrows"
        if not self._is_waited_for(order, borrower):
            _end_loan(errand.asked, errand.loan)
        elif isinstance(answer, Publication) and stamp_of(answer) == order.stamp:
            call = borrower.actor.stage.remote(answer, borrower.term)
            self._send(order, borrower, call, lender=errand.asked, loan=errand.loan)
        else:
            _end_loan(errand.asked, errand.loan)
            self.tell(Failed(order.replica, order.stamp))

    def _is_waited_for(self, order: CatchUp, borrower: Member) -> bool:
        standing = self.swap.replicas[order.replica]
        return self._members[order.replica] is borrower and (
            standing.part,
            standing.order,
            standing.peer,
        ) == (Part.PULLING, order.stamp, order.peer)

    def _arrived_from_replica(
        self, order: Stage | CatchUp | Commit | Fence, member: Member, answer: Any
    ) -> None:
        if isinstance(order, Fence):
            if member.report is not None:  # else it could swallow what is finished later
                ray.wait([member.report], timeout=_LAST_REPORT_S)
                member.report = None
            member.term = answer.term
            self.tell(Answered(order.replica, answer.serving))
        elif isinstance(answer, Failure):
            logger.warning("%s could not follow %s: %s", member.name, order, answer.error)
            if isinstance(order, Stage):
                self.refusals.append(answer.error)
            self.tell(Failed(order.replica, order.stamp))
        elif isinstance(order, Commit):
            self.tell(Committed(order.replica, order.stamp))
        else:
            self.tell(Staged(order.replica, answer))

    def _expired(self, errand: _Errand) -> None:
        order = errand.order
        _end_loan(errand.lender, errand.loan)
        if isinstance(order, Fence):
            silent_s = self._config.request_timeout_s
            self.deaths[errand.asked] = f"no answer for {silent_s:g} s after it was fenced"
        elif errand.borrower is not None:
            self._arrived_from_lender(errand, errand.borrower, None)
        else:
            self.tell(TimedOut(order.replica))

    def _forget_orders_to(self, member: Member) -> None:
        for call, errand in list(self._errands.items()):
            if errand.asked is member and errand.borrower is None:
                del self._errands[call]
                _end_loan(errand.lender, errand.loan)


def stamp_of(publication: Publication) -> Stamp:
    """Return which weights a publication brings."""
    return Stamp(publication.version, publication.digest)


def _end_loan(lender: Member | None, loan: str) -> None:
    if lender is not None and loan in lender.loans:
        lender.end_loan(loan)


def _may_fail(order: Stage | CatchUp | Commit | Fence) -> bool:
    """Return whether an error in answer to ``order`` is about the weights, not about the engine."""
    return not isinstance(order, Fence)
