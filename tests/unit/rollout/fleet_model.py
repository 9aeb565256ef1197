"""All histories of a small fleet: replicas with a truth of their own, and messages in flight.

A ``World`` is the coordinator's state, what each replica really holds, and every order and answer
on its way. ``moves`` lists all that can happen next; messages are delivered in any order. A replica
that says what it serves refuses every order given before (``rollout.replica`` counts terms), so
orders of a coordinator that is gone are left out, but for its questions. Faults are drawn from a
budget, which keeps the space finite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeGuard

from npr_megatron.rollout.health import Event, Health, Stamp
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
from npr_megatron.rollout.push import Part, Swap, restart


@dataclass(frozen=True, slots=True)
class Truth:
    """What a replica's process really holds."""

    alive: bool = True
    serving: Stamp | None = None
    staged: Stamp | None = None


@dataclass(frozen=True, slots=True)
class Budget:
    """How much may still happen."""

    pushes: int = 2
    failures: int = 0
    silences: int = 0
    deaths: int = 0
    source_losses: int = 0
    restarts: int = 0

    def spend(self, kind: str) -> Budget:
        return dataclasses.replace(self, **{kind: getattr(self, kind) - 1})


@dataclass(frozen=True, slots=True)
class World:
    """One moment of one history."""

    swap: Swap
    truths: tuple[Truth, ...]
    orders: frozenset[Action]
    answers: frozenset[PushEvent]
    budget: Budget
    source_lives: bool = True
    sick: int | None = None
    """The one replica that may fail orders."""

    def told(self, event: PushEvent) -> World:
        """The coordinator takes ``event``; its orders are on their way."""
        swap, actions = self.swap.after(event)
        for action in actions:
            assert swap.replicas[action.replica].state.health is not Health.DEAD, action
        return dataclasses.replace(self, swap=swap, orders=self.orders | frozenset(actions))

    def with_truth(self, replica: int, **changes: object) -> World:
        truths = list(self.truths)
        truths[replica] = dataclasses.replace(truths[replica], **changes)
        return dataclasses.replace(self, truths=tuple(truths))


def first_world(num_replicas: int, budget: Budget) -> World:
    """A fleet whose engines are up and empty."""
    swap = Swap.of(num_replicas)
    for replica in range(num_replicas):
        swap, _ = swap.after(Noticed(replica, Event.STARTED))
    truths = (Truth(),) * num_replicas
    return World(swap, truths, frozenset(), frozenset(), budget, sick=0)


def moves(world: World) -> Iterator[tuple[str, World]]:
    """Yield everything that can happen next, with a name."""
    budget, swap = world.budget, world.swap
    if budget.pushes and swap.is_settled and world.source_lives:
        version = 1 if swap.serving is None else swap.serving.version + 1
        # An aborted version may be published again with other bytes: the digest differs.
        pushed = dataclasses.replace(world, budget=budget.spend("pushes"))
        yield "push", pushed.told(Pushed(Stamp(version, 10 * version + budget.pushes)))
    for order in world.orders:
        for name, after in executed(world, order):
            yield f"{name} {order}", after
    for answer in world.answers:
        left = dataclasses.replace(world, answers=world.answers - {answer})
        yield f"arrives {answer}", left.told(answer)
    for replica, standing in enumerate(swap.replicas):
        busy = standing.part in (Part.STAGING, Part.PULLING, Part.COMMITTING)
        if busy and budget.silences:
            silent = dataclasses.replace(world, budget=budget.spend("silences"))
            yield f"times out {replica}", silent.told(TimedOut(replica))
        if world.truths[replica].alive and budget.deaths:
            yield f"dies {replica}", dead(world, replica, budget.spend("deaths"))
        if standing.state.health is Health.DEAD and not world.truths[replica].alive:
            fresh = unaddressed(world, replica)
            fresh = fresh.with_truth(replica, alive=True, serving=None, staged=None)
            fresh = fresh.told(Replaced(replica))
            yield f"is replaced {replica}", fresh.told(Noticed(replica, Event.STARTED))
    if world.source_lives and budget.source_losses:
        lost = dataclasses.replace(world, source_lives=False, budget=budget.spend("source_losses"))
        yield "source unnoticed lost", lost
        yield "source lost", lost.told(SourceLost())
    if budget.restarts:
        yield "coordinator restarts", restarted(world)


def dead(world: World, replica: int, budget: Budget) -> World:
    """The process is gone, and what was on its way to or from it; the coordinator hears later."""
    world = unaddressed(world.with_truth(replica, alive=False), replica)
    answers = world.answers | {Noticed(replica, Event.DIED)}
    return dataclasses.replace(world, budget=budget, answers=answers)


def unaddressed(world: World, replica: int) -> World:
    """Without what is on its way to or from the process that is, or was, in this seat."""
    return dataclasses.replace(
        world,
        orders=frozenset(order for order in world.orders if order.replica != replica),
        answers=frozenset(
            answer for answer in world.answers if getattr(answer, "replica", None) != replica
        ),
    )


def restarted(world: World) -> World:
    """A new coordinator asks; answers to the old one are lost, its orders may still arrive."""
    silent = [index for index, truth in enumerate(world.truths) if not truth.alive]
    serving = [truth.serving for truth in world.truths]
    swap, actions = restart(serving, silent, has_source=world.source_lives)
    for index in range(len(serving)):
        if index not in silent:
            world = world.with_truth(index, staged=None)
    questions = {order for order in world.orders if isinstance(order, Fence)}
    deaths = frozenset(Noticed(index, Event.DIED) for index in silent)
    return dataclasses.replace(
        world,
        swap=swap,
        orders=frozenset(order for order in (*questions, *actions) if order.replica not in silent),
        answers=deaths,
        budget=world.budget.spend("restarts"),
    )


def executed(world: World, order: Action) -> Iterator[tuple[str, World]]:
    """Yield the outcomes of an order that reaches its replica."""
    world = dataclasses.replace(world, orders=world.orders - {order})
    replica, truth = order.replica, world.truths[order.replica]
    if not truth.alive:
        yield "nobody gets", world
        return
    match order:
        case Replace():
            yield "kills", dead(world, replica, world.budget)
        case Fence():
            yield (
                "asks",
                said(world.with_truth(replica, staged=None), Answered(replica, truth.serving)),
            )
        case Abort(_, stamp):
            yield (
                "drops",
                world.with_truth(replica, staged=None if truth.staged == stamp else truth.staged),
            )
        case Commit(_, stamp):
            if truth.staged == stamp and (truth.serving or Stamp(0, 0)).version < stamp.version:
                after = world.with_truth(replica, serving=stamp, staged=None)
                yield "commits", said(after, Committed(replica, stamp))
            else:
                yield "cannot commit", said(world, Failed(replica, stamp))
        case Stage(_, stamp) | CatchUp(_, stamp):
            peer = order.peer if isinstance(order, CatchUp) else None
            can = world.source_lives if peer is None else holds(world.truths[peer], stamp)
            if can:
                staged = world.with_truth(replica, staged=stamp)
                yield "stages", said(staged, Staged(replica, stamp))
            torn = world.with_truth(replica, staged=None)
            if not can:
                yield "finds nothing", said(torn, Failed(replica, stamp))
            elif world.budget.failures and replica == world.sick:
                torn = dataclasses.replace(torn, budget=torn.budget.spend("failures"))
                yield "fails", said(torn, Failed(replica, stamp))


def is_voided(order: Action, replica: int) -> TypeGuard[Stage | CatchUp | Commit]:
    return order.replica == replica and isinstance(order, Stage | CatchUp | Commit)


def holds(truth: Truth, stamp: Stamp) -> bool:
    return truth.alive and truth.serving == stamp


def said(world: World, answer: PushEvent) -> World:
    return dataclasses.replace(world, answers=world.answers | {answer})


def explore(first: World, limit: int) -> Iterator[tuple[World, list[tuple[str, World]]]]:
    """Yield every reachable world with all its successors; fail beyond ``limit`` worlds."""
    seen, stack = {first}, [first]
    while stack:
        world = stack.pop()
        successors = list(moves(world))
        yield world, successors
        for _, following in successors:
            if following not in seen:
                seen.add(following)
                stack.append(following)
        assert len(seen) <= limit, f"more than {limit} worlds"
