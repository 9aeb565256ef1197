"""The cursor: its own rules, and independence of the order in which branches grow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.errors import LayoutError
from npr_megatron.topology.cursor import Place, TopologyCursor
from npr_megatron.topology.layout import layout_of
from tests.structures import QUICK, Structure, structures
from tests.unit.topology.oracles import Fork, Run, program_of


@QUICK
@given(structures(), st.sampled_from(["canonical", "paper"]), st.randoms())
def test_branches_grown_in_any_order_get_the_places_of_the_linear_text(
    structure: Structure, convention, random
):
    layout = layout_of(
        structure.token_ids, structure.prompt_length, structure.vocabulary, convention
    )
    cursor = TopologyCursor(convention)
    places: list[Place] = []
    for item in program_of(structure):
        if isinstance(item, Run):
            places += [cursor.place_trunk() for _ in item.ids]
            continue
        places += place_shuffled(cursor, item, random)
    streams = (layout.position_ids, layout.block, layout.branch)
    assert places == [Place(*place) for place in zip(*map(list, streams), strict=True)]


def place_shuffled(cursor: TopologyCursor, fork: Fork, random) -> list[Place]:
    lengths = [sum(len(run.ids) for run in branch) for branch in fork.branches]
    turns = [j for j, length in enumerate(lengths) for _ in range(length)]
    random.shuffle(turns)
    grown: list[list[Place]] = [[] for _ in lengths]
    cursor.fork(len(lengths))
    for j in turns:
        grown[j].append(cursor.place_branch(j + 1))
    cursor.join()
    return [place for branch in grown for place in branch]


def test_trunk_goes_on_behind_the_furthest_branch():
    cursor = TopologyCursor(start=10)
    assert cursor.place_trunk() == Place(10, 0, 0)
    cursor.fork(2)
    assert cursor.place_branch(2) == Place(11, 1, 2)
    assert cursor.place_branch(2) == Place(12, 1, 2)
    assert cursor.place_branch(1) == Place(11, 1, 1)
    assert cursor.is_forked and cursor.position == 13
    cursor.join()
    assert cursor.place_trunk() == Place(13, 0, 0)
    cursor.fork(1)
    assert cursor.place_branch(1) == Place(14, 2, 1)


def test_paper_convention_overlaps_one_token_at_the_fork_and_one_at_the_join():
    cursor = TopologyCursor("paper")
    assert [cursor.place_trunk().position for _ in range(3)] == [0, 1, 2]
    cursor.fork(1)
    assert [cursor.place_branch(1).position for _ in range(4)] == [2, 3, 4, 5]
    cursor.join()
    assert cursor.place_trunk().position == 5


def test_calls_out_of_order_are_refused():
    cursor = TopologyCursor()
    with pytest.raises(LayoutError, match="no branch is open"):
        cursor.join()
    with pytest.raises(LayoutError, match="branch 1 was asked for, but 0"):
        cursor.place_branch(1)
    with pytest.raises(LayoutError, match="into 0 branches"):
        cursor.fork(0)
    cursor.fork(2)
    with pytest.raises(LayoutError, match="forks do not nest"):
        cursor.fork(2)
    with pytest.raises(LayoutError, match="join them first"):
        cursor.place_trunk()
    with pytest.raises(LayoutError, match="branch 3 was asked for, but 2"):
        cursor.place_branch(3)
    with pytest.raises(LayoutError, match="branch 0"):
        cursor.place_branch(0)
