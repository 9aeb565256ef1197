"""The versioned swap of a fleet's weights as a pure state machine: no clock, no Ray.

Two phases. Every replica that can be reached stages the new weights and verifies their digest;
when none is left staging and at least one is READY, the push is decided: it is committed and cannot
be undone. The fleet serves the new stamp from the decision on, and each replica is routable from
its own acknowledgement on. When nobody is READY, or the source is lost before the decision, the
push is aborted everywhere and the fleet goes on serving what it served.

Per replica (``Standing.part``)::

    IDLE --stage--> STAGING --staged--> READY --commit--> COMMITTING --committed--> IDLE
                    STAGING --failed twice--> REFUSED       (fenced if the others commit)
    IDLE --catch_up--> PULLING --staged--> COMMITTING --committed--> IDLE

A replica that leaves an order unanswered is fenced and is asked what it serves. By answering it
drops what it had staged and voids every order given before, late ones included. When it answers, or
a replacement has started, it catches up with the fleet from the publication, or from a peer once
the publication cannot be read.

Invariants, proved by exploring all histories of small fleets in the tests: whatever is routable
serves the fleet's stamp; the fleet's version never goes back; no order goes to a dead replica;
every order outstanding ends in an answer, a time-out or a death, and then the machine has decided.

Not decided here: how long to wait (the caller sends ``TimedOut``), who is killed (``Replace`` asks
for it), and which requests go where (``rollout.router``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, assert_never

from npr_megatron.rollout.health import Event, Health, ReplicaState, Stamp
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
    Replaced,
    SourceLost,
    Stage,
    Staged,
    TimedOut,
)

MAX_FAILURES = 2
"""Failures of one order after which a replica is not asked again."""


class Part(StrEnum):
    """What a replica is doing about new weights."""

    IDLE = "idle"
    STAGING = "staging"  # copies the weights of the push under way
    READY = "ready"  # holds and has verified them
    REFUSED = "refused"  # could not get them; serves the old ones
    PULLING = "pulling"  # copies the weights that the fleet serves
    COMMITTING = "committing"  # was told to serve what it staged


@dataclass(frozen=True, slots=True)
class Standing:
    """One replica as the push sees it."""

    state: ReplicaState = field(default_factory=ReplicaState)
    part: Part = Part.IDLE
    order: Stamp | None = None
    """Which weights ``part`` is about."""
    peer: int | None = None
    """Where it pulls from; None is the publication."""
    num_failures: int = 0


@dataclass(frozen=True, slots=True)
class Swap:
    """The weights of a fleet: what it serves, what is being pushed, where each replica stands."""

    replicas: tuple[Standing, ...]
    serving: Stamp | None = None
    """What the fleet serves; None before the first push."""
    target: Stamp | None = None
    """What is being staged; None after the decision."""
    has_source: bool = False
    """Whether the publication of ``serving`` is believed readable."""

    @classmethod
    def of(cls, num_replicas: int) -> Swap:
        """Return the state of a fleet whose processes are being started."""
        return cls((Standing(),) * num_replicas)

    @property
    def is_settled(self) -> bool:
        """Whether no push is under way: nobody stages, nobody owes an acknowledgement."""
        return self.target is None and all(x.part is not Part.COMMITTING for x in self.replicas)

    @property
    def is_lost(self) -> bool:
        """Whether the weights the fleet serves are nowhere left to get: only a new push helps."""
        return self.serving is not None and not (
            self.has_source
            or any(
                standing.state.health is Health.FENCED
                or standing.part in (Part.PULLING, Part.COMMITTING)
                or _holds(standing, self.serving)
                for standing in self.replicas
            )
        )

    def is_routable(self, replica: int) -> bool:
        """Return whether new requests may go to ``replica``."""
        return self.serving is not None and self.replicas[replica].state.is_routable(self.serving)

    def after(self, event: PushEvent) -> tuple[Swap, tuple[Action, ...]]:
        """Return the state after ``event`` and what is to be done now, in order.

        Late answers change nothing. Raises ValueError for what the caller must not do: push while a
        push is under way, or a version that is not newer.
        """
        turn = _Turn(self)
        turn.take(event)
        turn.conclude()
        return turn.result()


def restart(
    answers: Sequence[Stamp | None], silent: Sequence[int], *, has_source: bool
) -> tuple[Swap, tuple[Action, ...]]:
    """Return the state of a new coordinator of replicas that an earlier one left behind.

    A push is finished if anybody committed it, else it is gone: answering dropped what was staged.

    Args:
        answers: what each replica serves, as asked by Fence; ignored for those in ``silent``.
        silent: replicas that did not answer (yet).
        has_source: whether the publication of the newest of ``answers`` can be read.
    """
    said = [stamp for i, stamp in enumerate(answers) if i not in silent and stamp is not None]
    fenced = Standing(ReplicaState(Health.FENCED))
    swap = Swap((fenced,) * len(answers), serving=max(said, default=None), has_source=has_source)
    actions: list[Action] = [Fence(replica) for replica in silent]
    for replica, stamp in enumerate(answers):
        if replica not in silent:
            swap, more = swap.after(Answered(replica, stamp))
            actions += more
    return swap, tuple(actions)


class _Turn:
    """One event's worth of changes, on a private copy of the state."""

    def __init__(self, swap: Swap) -> None:
        self._serving, self._target = swap.serving, swap.target
        self._has_source = swap.has_source
        self._replicas = list(swap.replicas)
        self._actions: list[Action] = []

    def result(self) -> tuple[Swap, tuple[Action, ...]]:
        swap = Swap(tuple(self._replicas), self._serving, self._target, self._has_source)
        return swap, tuple(self._actions)

    def take(self, event: PushEvent) -> None:
        match event:
            case Pushed(stamp):
                self._begin(stamp)
            case Staged(replica, stamp):
                self._staged(replica, stamp)
            case Committed(replica, stamp):
                self._committed(replica, stamp)
            case Failed(replica, stamp):
                self._failed(replica, stamp)
            case TimedOut(replica):
                if self._replicas[replica].part in (Part.STAGING, Part.PULLING, Part.COMMITTING):
                    self._fence(replica)
            case Answered(replica, serving):
                self._answered(replica, serving)
            case Noticed(replica, what):
                self._noticed(replica, what)
            case Replaced(replica):
                self._replicas[replica] = Standing()
            case SourceLost():
                self._has_source = False
                self._abort()
            case _:
                assert_never(event)

    def conclude(self) -> None:
        """Decide the push if nobody is left staging; then send off who has to catch up."""
        parts = {standing.part for standing in self._replicas}
        if self._target is not None and Part.STAGING not in parts:
            if Part.READY in parts:
                self._commit(self._target)
            else:
                self._abort()
        for replica, standing in enumerate(self._replicas):
            if standing.state.health is Health.CATCHING_UP and standing.part is Part.IDLE:
                self._catch_up(replica, standing)

    def _begin(self, stamp: Stamp) -> None:
        if self._target is not None or any(x.part is Part.COMMITTING for x in self._replicas):
            raise ValueError(f"{stamp} is pushed while another push is under way")
        if self._serving is not None and stamp.version <= self._serving.version:
            raise ValueError(f"{stamp} is pushed over {self._serving}; versions only grow")
        self._target = stamp
        for replica, standing in enumerate(self._replicas):
            if standing.state.has_engine and standing.part is Part.IDLE:
                self._set(replica, part=Part.STAGING, order=stamp, num_failures=0)
                self._actions.append(Stage(replica, stamp))

    def _staged(self, replica: int, stamp: Stamp) -> None:
        if self._owes(replica, stamp, Part.STAGING):
            self._set(replica, part=Part.READY)
        elif self._owes(replica, stamp, Part.PULLING):
            self._free(replica)
            if stamp == self._serving:  # else the fleet went on meanwhile: it pulls again
                self._set(replica, part=Part.COMMITTING, order=stamp)
                self._actions.append(Commit(replica, stamp))

    def _committed(self, replica: int, stamp: Stamp) -> None:
        if self._owes(replica, stamp, Part.COMMITTING):
            self._become(replica, Event.CAUGHT_UP, serving=stamp)
            self._free(replica)
            if stamp != self._serving:
                self._become(replica, Event.OUTDATED)

    def _failed(self, replica: int, stamp: Stamp) -> None:
        num_failures = self._replicas[replica].num_failures + 1
        if self._owes(replica, stamp, Part.COMMITTING):
            self._fence(replica)
        elif self._owes(replica, stamp, Part.STAGING):
            self._set(replica, num_failures=num_failures)
            if num_failures < MAX_FAILURES:
                self._actions.append(Stage(replica, stamp))
            else:
                self._set(replica, part=Part.REFUSED)
        elif self._owes(replica, stamp, Part.PULLING):
            self._failed_to_pull(replica, stamp, num_failures)

    def _failed_to_pull(self, replica: int, stamp: Stamp, num_failures: int) -> None:
        """Try elsewhere: the publication is not read again, a peer is one of several."""
        if self._replicas[replica].peer is None:
            self._free(replica)
            if stamp == self._serving:
                self._has_source = False
        elif num_failures < MAX_FAILURES:
            self._free(replica)
            self._set(replica, num_failures=num_failures)
        else:
            self._become(replica, Event.FENCED)
            self._free(replica)
            self._actions.append(Replace(replica))

    def _answered(self, replica: int, serving: Stamp | None) -> None:
        if self._replicas[replica].state.health is not Health.FENCED:
            return
        if serving is not None and (
            self._serving is None
            or (serving != self._serving and serving.version >= self._serving.version)
        ):
            self._actions.append(Replace(replica))  # ahead of the fleet: engines do not go back
            return
        self._become(replica, Event.ANSWERED)
        if serving is not None and serving == self._serving:
            self._become(replica, Event.CAUGHT_UP, serving=serving)

    def _noticed(self, replica: int, what: Event) -> None:
        state = self._replicas[replica].state
        if what in (Event.SILENT, Event.PROGRESSED):
            if state.health in (Health.HEALTHY, Health.SUSPECT):
                self._become(replica, what)
        elif state.health is not Health.DEAD:
            self._become(replica, what)
            self._free(replica)

    def _commit(self, stamp: Stamp) -> None:
        self._serving, self._target, self._has_source = stamp, None, True
        for replica, standing in enumerate(self._replicas):
            if standing.part is Part.READY:
                self._set(replica, part=Part.COMMITTING)
                self._actions.append(Commit(replica, stamp))
            elif standing.part is Part.REFUSED:
                self._fence(replica)
            elif standing.state.health in (Health.HEALTHY, Health.SUSPECT):
                self._become(replica, Event.OUTDATED)  # it caught up while the others staged

    def _abort(self) -> None:
        if self._target is None:
            return
        for replica, standing in enumerate(self._replicas):
            if standing.part in (Part.STAGING, Part.READY):
                self._actions.append(Abort(replica, self._target))
            if standing.part in (Part.STAGING, Part.READY, Part.REFUSED):
                self._free(replica)
        self._target = None

    def _catch_up(self, replica: int, standing: Standing) -> None:
        if self._serving is None:
            return
        peers = [
            index for index, other in enumerate(self._replicas) if _holds(other, self._serving)
        ]
        if not (self._has_source or peers):
            return
        peer = None if self._has_source else peers[standing.num_failures % len(peers)]
        self._set(replica, part=Part.PULLING, order=self._serving, peer=peer)
        self._actions.append(CatchUp(replica, self._serving, peer))

    def _fence(self, replica: int) -> None:
        self._become(replica, Event.FENCED)
        self._free(replica)
        self._actions.append(Fence(replica))

    def _owes(self, replica: int, stamp: Stamp, part: Part) -> bool:
        standing = self._replicas[replica]
        return standing.part is part and standing.order == stamp

    def _become(self, replica: int, event: Event, *, serving: Stamp | None = None) -> None:
        self._set(replica, state=self._replicas[replica].state.after(event, serving=serving))

    def _free(self, replica: int) -> None:
        self._replicas[replica] = Standing(self._replicas[replica].state)

    def _set(self, replica: int, **changes: Any) -> None:
        self._replicas[replica] = dataclasses.replace(self._replicas[replica], **changes)


def _holds(standing: Standing, stamp: Stamp) -> bool:
    """Return whether a replica serves ``stamp`` and can hand it on."""
    healthy = standing.state.health in (Health.HEALTHY, Health.SUSPECT)
    return healthy and standing.state.serving == stamp
