"""What trajectories hold, and when they give it back."""

import pytest

from npr_megatron.engine.sglang.scheduler.leases import Leases


@pytest.fixture
def leases() -> Leases[str]:
    return Leases(timeout_s=100.0)


def test_a_join_takes_the_place_of_all_that_was_held(leases):
    assert leases.hold("a", "branch 1", alone=False) == []
    assert leases.hold("a", "branch 2", alone=False) == []
    assert leases.hold("b", "branch 1 of b", alone=False) == []
    assert leases.hold("a", "joined", alone=True) == ["branch 1", "branch 2"]
    assert len(leases) == 2
    assert leases.end(["a", "b"]) == ["joined", "branch 1 of b"]
    assert len(leases) == 0


def test_ending_is_idempotent_and_final(leases):
    leases.hold("a", "one", alone=False)
    assert leases.end(["a", "nobody"]) == ["one"]
    assert leases.end(["a"]) == []
    assert leases.hold("a", "late", alone=False) == ["late"], "a stage that was given up"
    assert len(leases) == 0


def test_who_stirs_is_not_taken_for_dead(leases):
    for name in ("quiet", "busy"):
        leases.hold(name, f"of {name}", alone=False)
    assert leases.expire(1000.0) == []
    leases.stir("busy")
    assert leases.expire(1090.0) == []
    assert leases.expire(1101.0) == ["of quiet"]
    assert leases.expire(1190.0) == []
    assert leases.expire(1191.0) == ["of busy"]
    assert len(leases) == 0


def test_an_emptied_tree_takes_no_locks_back(leases):
    leases.hold("a", "one", alone=False)
    leases.clear()
    assert len(leases) == 0
    assert leases.end(["a"]) == []
    assert leases.expire(1e9) == []
