"""Room on SGLang: nobody holds room that is not there, nobody overtakes, nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.config.engine import EngineConfig
from npr_megatron.engine.sglang.client.reservations import (
    Reservations,
    room_problems,
    slots_of,
    usable_slots,
)
from npr_megatron.records.trajectory import DecodeMode
from tests.engines import request_for
from tests.structures import QUICK

SLOTS = 100
sizes = st.lists(st.integers(1, SLOTS), min_size=1, max_size=12)


def finish(reservations: Reservations, name: str) -> None:
    """A life ends in order: its leases are ended by the next stage of its rank."""
    rank = reservations.rank_of(name)
    reservations.leave(name)
    reservations.released(reservations.take_releases(rank))


@QUICK
@given(sizes=sizes, num_ranks=st.integers(1, 3), max_running=st.integers(1, 4), choice=st.randoms())
def test_whoever_fits_alone_is_admitted_in_order_whatever_ends_first(
    sizes, num_ranks, max_running, choice
):
    reservations = Reservations(SLOTS, num_ranks, max_running)
    for age, size in enumerate(sizes):
        reservations.wait(str(age), size, prompt=(age % 2,), age=age)
    running: list[str] = []
    admitted: list[str] = []
    while len(admitted) < len(sizes) or running:
        names = reservations.admit()
        admitted += names
        running += names
        reservations.check_integrity()
        assert len(running) <= max_running
        for rank in range(num_ranks):
            held = sum(sizes[int(name)] for name in running if reservations.rank_of(name) == rank)
            assert held <= SLOTS
        assert running, "room is free and nobody who waits gets it"
        name = choice.choice(running)
        running.remove(name)
        finish(reservations, name)
    assert admitted == [str(age) for age in range(len(sizes))]
    assert reservations.num_reserved == 0


@QUICK
@given(sizes=sizes, choice=st.randoms())
def test_lives_that_are_lost_come_back_before_younger_ones(sizes, choice):
    reservations = Reservations(SLOTS, 1, 64)
    for age, size in enumerate(sizes):
        reservations.wait(f"{age}", size, prompt=(), age=age)
    first = reservations.admit()
    lost = choice.choice(first)
    reservations.wait(f"{lost} again", sizes[int(lost)], prompt=(), age=int(lost))
    finish(reservations, lost)
    admitted = reservations.admit()
    assert admitted[0] == f"{lost} again"


def test_room_is_free_when_the_leases_have_ended_and_not_before():
    reservations = Reservations(SLOTS, 1, 8)
    for age, name in enumerate("ab"):
        reservations.wait(name, 60, prompt=(), age=age)
    assert reservations.admit() == ["a"]
    reservations.stage_begun("a")
    reservations.leave("a")
    assert reservations.take_releases(0) == (), "its stage is still under way"
    reservations.stage_ended("a")
    assert reservations.ranks_to_release == [0]
    names = reservations.take_releases(0)
    assert (names, reservations.admit()) == (("a",), [])
    reservations.released(names)
    assert reservations.admit() == ["b"]


def test_a_release_that_was_not_heard_is_told_again():
    reservations = Reservations(SLOTS, 1, 8)
    reservations.wait("a", 60, prompt=(), age=0)
    reservations.admit()
    reservations.leave("a")
    names = reservations.take_releases(0)
    reservations.put_back(0, names)
    assert reservations.take_releases(0) == names
    reservations.released(names)
    reservations.put_back(0, names)
    assert reservations.take_releases(0) == (), "told and done"


def test_releases_wait_for_a_stage_to_ride_on_unless_somebody_waits():
    reservations = Reservations(SLOTS, 1, 8)
    for age, name in enumerate("ab"):
        reservations.wait(name, 40, prompt=(), age=age)
    reservations.admit()
    reservations.stage_begun("b")
    reservations.leave("a")
    assert reservations.ranks_to_release == []
    reservations.wait("c", 90, prompt=(), age=2)
    assert reservations.ranks_to_release == [0]


def test_a_rank_with_less_reserved_is_chosen_unless_the_prompt_would_cost_more_there():
    reservations = Reservations(SLOTS, 2, 8)
    long, short = (1,) * 30, (2,) * 5
    for age, prompt in enumerate([long, short, long, long, long, short]):
        reservations.wait(str(age), 20, prompt=prompt, age=age)
    assert reservations.admit() == ["0", "1", "2", "3", "4", "5"]
    # Reserved before each: (0, 0), (20, 0), (20, 20), (40, 20), (60, 20), (60, 40).
    ranks = [reservations.rank_of(str(age)) for age in range(6)]
    assert ranks == [0, 1, 0, 0, 1, 1]


def test_a_flush_frees_everything_but_those_who_wait():
    reservations = Reservations(SLOTS, 1, 8)
    for age, name in enumerate("ab"):
        reservations.wait(name, 60, prompt=(), age=age)
    reservations.admit()
    reservations.flushed()
    assert (reservations.num_reserved, reservations.num_waiting) == (0, 1)
    reservations.stage_ended("a")  # answered late
    assert reservations.admit() == ["b"]


@pytest.mark.parametrize("mode", list(DecodeMode))
def test_what_can_never_fit_is_refused_with_its_numbers(mode):
    config = EngineConfig(num_kv_slots=1000)
    request = request_for([20] * 10, mode=mode, max_new_tokens=600)
    needed, usable = slots_of(request, config), usable_slots(config)
    problems = room_problems(request, config)
    if mode is DecodeMode.SEQUENTIAL:
        assert (problems, needed <= usable) == ([], True)
        return
    assert needed >= 10 + 2 * 600
    assert len(problems) == 1
    for number in (10, 600, needed, usable):
        assert str(number) in problems[0]
