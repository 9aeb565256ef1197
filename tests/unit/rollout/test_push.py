"""The swap machine: stories told by hand, then every history of small fleets."""

import dataclasses

import pytest

from npr_megatron.rollout.health import Event, Health, Stamp
from npr_megatron.rollout.orders import (
    Abort,
    Answered,
    CatchUp,
    Commit,
    Committed,
    Failed,
    Fence,
    Noticed,
    Pushed,
    Replace,
    Replaced,
    SourceLost,
    Stage,
    Staged,
    TimedOut,
)
from npr_megatron.rollout.push import Part, Swap, restart
from tests.unit.rollout.fleet_model import Budget, World, explore, first_world

ONE, TWO, THREE = Stamp(1, 11), Stamp(2, 22), Stamp(3, 33)


def told(swap: Swap, *events):
    """The state after ``events`` and the actions of the last one."""
    actions = ()
    for event in events:
        swap, actions = swap.after(event)
    return swap, actions


def pushed(swap: Swap, stamp: Stamp) -> Swap:
    """After an undisturbed push."""
    swap, actions = swap.after(Pushed(stamp))
    stages = [action for action in actions if isinstance(action, Stage)]
    for stage in stages:
        swap, _ = swap.after(Staged(stage.replica, stamp))
    for stage in stages:
        swap, _ = swap.after(Committed(stage.replica, stamp))
    return swap


def fleet_serving(stamp: Stamp, num_replicas: int = 3) -> Swap:
    swap = Swap.of(num_replicas)
    for replica in range(num_replicas):
        swap, _ = swap.after(Noticed(replica, Event.STARTED))
    return pushed(swap, stamp)


def routable(swap: Swap) -> list[int]:
    return [index for index in range(len(swap.replicas)) if swap.is_routable(index)]


def test_a_push_stages_everywhere_then_commits_everywhere() -> None:
    swap, actions = told(fleet_serving(ONE), Pushed(TWO))
    assert actions == (Stage(0, TWO), Stage(1, TWO), Stage(2, TWO))
    assert routable(swap) == [0, 1, 2]
    swap, actions = told(swap, Staged(1, TWO), Staged(0, TWO))
    assert actions == ()
    assert (swap.serving, routable(swap)) == (ONE, [0, 1, 2])
    swap, actions = told(swap, Staged(2, TWO))
    assert actions == (Commit(0, TWO), Commit(1, TWO), Commit(2, TWO))
    assert (swap.serving, routable(swap), swap.is_settled) == (TWO, [], False)
    swap, _ = told(swap, Committed(1, TWO))
    assert routable(swap) == [1]
    swap, _ = told(swap, Committed(0, TWO), Committed(2, TWO))
    assert (routable(swap), swap.is_settled) == ([0, 1, 2], True)


def test_who_misses_the_deadline_is_fenced_and_the_others_commit() -> None:
    swap, _ = told(fleet_serving(ONE), Pushed(TWO), Staged(0, TWO), Staged(2, TWO))
    swap, actions = told(swap, TimedOut(1))
    assert actions == (Fence(1), Commit(0, TWO), Commit(2, TWO))
    swap, actions = told(swap, Committed(0, TWO), Committed(2, TWO), Staged(1, TWO))
    assert (routable(swap), actions) == ([0, 2], ())
    swap, actions = told(swap, Answered(1, ONE))
    assert actions == (CatchUp(1, TWO, None),)
    swap, actions = told(swap, Staged(1, TWO))
    assert actions == (Commit(1, TWO),)
    swap, _ = told(swap, Committed(1, TWO))
    assert routable(swap) == [0, 1, 2]


def test_who_fails_twice_is_fenced_if_anybody_succeeds() -> None:
    swap, actions = told(fleet_serving(ONE), Pushed(TWO), Failed(0, TWO))
    assert actions == (Stage(0, TWO),)
    swap, actions = told(swap, Staged(1, TWO), Staged(2, TWO), Failed(0, TWO))
    assert actions == (Fence(0), Commit(1, TWO), Commit(2, TWO))


def test_weights_that_nobody_could_get_are_aborted_and_the_old_ones_served() -> None:
    swap, _ = told(fleet_serving(ONE, 2), Pushed(TWO))
    for replica in (0, 0, 1, 1):
        swap, actions = told(swap, Failed(replica, TWO))
    assert (swap.serving, swap.is_settled, actions) == (ONE, True, ())
    assert routable(swap) == [0, 1]
    assert routable(pushed(swap, TWO)) == [0, 1]


def test_a_source_lost_before_the_decision_aborts_everywhere() -> None:
    swap, actions = told(fleet_serving(ONE), Pushed(TWO), Staged(0, TWO), SourceLost())
    assert actions == (Abort(0, TWO), Abort(1, TWO), Abort(2, TWO))
    assert (swap.serving, swap.is_settled, routable(swap)) == (ONE, True, [0, 1, 2])
    assert told(swap, Staged(1, TWO)) == (swap, ())  # late


def test_a_death_after_ready_does_not_stop_the_others_and_the_successor_catches_up() -> None:
    swap, _ = told(fleet_serving(ONE), *[Pushed(TWO), Staged(0, TWO), Staged(1, TWO)])
    swap, _ = told(swap, Staged(2, TWO), Noticed(0, Event.DIED), Committed(1, TWO))
    assert (swap.serving, routable(swap)) == (TWO, [1])
    swap, actions = told(swap, Replaced(0), Noticed(0, Event.STARTED))
    assert actions == (CatchUp(0, TWO, None),)


def test_without_a_readable_publication_a_newcomer_pulls_from_a_peer() -> None:
    swap, _ = told(fleet_serving(ONE), SourceLost(), Noticed(1, Event.DIED))
    swap, actions = told(swap, Replaced(1), Noticed(1, Event.STARTED))
    assert actions == (CatchUp(1, ONE, 0),)
    swap, actions = told(swap, Failed(1, ONE))
    assert actions == (CatchUp(1, ONE, 2),)  # another one
    swap, actions = told(swap, Failed(1, ONE))
    assert actions == (Replace(1),)


def test_a_publication_found_unreadable_is_not_tried_again() -> None:
    swap, _ = told(fleet_serving(ONE), Noticed(1, Event.DIED), Replaced(1))
    swap, actions = told(swap, Noticed(1, Event.STARTED))
    assert actions == (CatchUp(1, ONE, None),)
    swap, actions = told(swap, Failed(1, ONE))
    assert actions == (CatchUp(1, ONE, 0),)


def test_weights_held_by_nobody_are_lost_until_the_next_push() -> None:
    swap, _ = told(fleet_serving(ONE, 1), SourceLost())
    assert not swap.is_lost
    swap, _ = told(swap, Noticed(0, Event.DIED), Replaced(0))
    swap, actions = told(swap, Noticed(0, Event.STARTED))
    assert (swap.is_lost, actions) == (True, ())
    assert routable(pushed(swap, TWO)) == [0]


def test_one_that_catches_up_while_others_stage_has_to_catch_up_again() -> None:
    swap, _ = told(fleet_serving(ONE), Noticed(2, Event.DIED), Pushed(TWO), Replaced(2))
    swap, actions = told(swap, Noticed(2, Event.STARTED))
    assert actions == (CatchUp(2, ONE, None),)
    swap, _ = told(swap, Staged(2, ONE), Committed(2, ONE), Staged(0, TWO))
    assert routable(swap) == [0, 1, 2]
    swap, actions = told(swap, Staged(1, TWO))
    assert actions == (Commit(0, TWO), Commit(1, TWO), CatchUp(2, TWO, None))
    swap, _ = told(swap, Committed(0, TWO), Committed(1, TWO))
    assert routable(swap) == [0, 1]


def test_a_fenced_replica_that_did_commit_is_back_at_once_and_one_ahead_is_replaced() -> None:
    swap, _ = told(fleet_serving(ONE, 2), Pushed(TWO), Staged(0, TWO), Staged(1, TWO))
    swap, _ = told(swap, Committed(0, TWO), TimedOut(1))
    assert swap.is_settled
    assert told(swap, Answered(1, TWO))[0].is_routable(1)
    assert told(swap, Answered(1, THREE))[1] == (Replace(1),)
    assert told(swap, Answered(1, dataclasses.replace(TWO, digest=5)))[1] == (Replace(1),)


def test_versions_only_grow_and_pushes_do_not_overlap() -> None:
    swap = fleet_serving(TWO)
    for stamp in (ONE, TWO, dataclasses.replace(TWO, digest=7)):
        with pytest.raises(ValueError, match="only grow"):
            swap.after(Pushed(stamp))
    swap, _ = swap.after(Pushed(THREE))
    with pytest.raises(ValueError, match="under way"):
        swap.after(Pushed(Stamp(4, 44)))


def test_a_new_coordinator_finishes_what_anybody_committed() -> None:
    swap, actions = restart([ONE, TWO, None], [], has_source=False)
    assert swap.serving == TWO
    assert routable(swap) == [1]
    assert actions == (CatchUp(2, TWO, 1), CatchUp(0, TWO, 1)) or actions == (
        CatchUp(0, TWO, 1),
        CatchUp(2, TWO, 1),
    )
    swap, actions = restart([ONE, None, ONE], [1], has_source=True)
    assert (swap.serving, routable(swap), actions) == (ONE, [0, 2], (Fence(1),))


HISTORIES = {
    "failures": (3, Budget(pushes=2, failures=3)),
    "silence": (3, Budget(pushes=2, silences=1)),
    "death": (3, Budget(pushes=2, deaths=1)),
    "death without a source": (3, Budget(pushes=1, source_losses=1, deaths=1)),
    "silence and restart": (2, Budget(pushes=2, silences=1, restarts=1)),
    "silence, failure, no source": (
        2,
        Budget(pushes=2, silences=1, failures=1, source_losses=1),
    ),
    "death and restart": (2, Budget(pushes=2, deaths=1, restarts=1)),
}
MOST_WORLDS = 100_000


@pytest.mark.parametrize("name", HISTORIES)
def test_no_history_breaks_a_promise(name: str) -> None:
    num_worlds = num_ends = 0
    for world, successors in explore(first_world(*HISTORIES[name]), MOST_WORLDS):
        num_worlds += 1
        check(world)
        for move, following in successors:
            check_step(world, move, following)
        if not successors:
            num_ends += 1
            check_end(world)
    assert num_worlds > 1000
    assert num_ends > 0


def test_the_exploration_sees_a_replica_that_is_routed_too_early() -> None:
    """The same promises over a coordinator that takes the order to commit for its fulfilment."""
    first = first_world(2, Budget(pushes=2, silences=1))
    with pytest.raises(AssertionError):
        for world, _ in explore(first, MOST_WORLDS):
            hasty = world.swap
            for replica, standing in enumerate(hasty.replicas):
                if standing.part is Part.COMMITTING and hasty.serving is not None:
                    hasty, _ = hasty.after(Committed(replica, hasty.serving))
            check(dataclasses.replace(world, swap=hasty))


def check(world: World) -> None:
    """Whatever is routable really serves the fleet's stamp, and nobody waits for nothing."""
    swap = world.swap
    for replica, (standing, truth) in enumerate(zip(swap.replicas, world.truths, strict=True)):
        if swap.is_routable(replica):
            assert standing.state.health is Health.HEALTHY
            assert not truth.alive or truth.serving == swap.serving
        if standing.part in (Part.STAGING, Part.PULLING, Part.COMMITTING):
            on_its_way = world.orders | world.answers
            assert any(getattr(message, "replica", None) == replica for message in on_its_way)


def check_step(world: World, move: str, following: World) -> None:
    """The fleet's version never goes back, unless nobody is left who knows the newer one."""
    before, after = world.swap.serving, following.swap.serving
    if before is None or move == "coordinator restarts":
        return
    assert after is not None
    assert after.version >= before.version
    if after.version == before.version:
        assert after == before


def check_end(world: World) -> None:
    """When nothing can happen any more, every replica serves the fleet's stamp, or it is lost."""
    swap = world.swap
    assert swap.is_settled
    if swap.serving is not None and not swap.is_lost:
        assert routable(swap) == list(range(len(swap.replicas)))
