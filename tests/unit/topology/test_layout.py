"""Layouts against a recursive walker, the published algorithm and a hand-computed response."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from npr_megatron.errors import LayoutError
from npr_megatron.schema.graph import execution_graph
from npr_megatron.schema.parse import parse
from npr_megatron.topology.layout import layout_of, plain_layout, predecessors
from tests.structures import QUICK, SMALL, Structure, structures
from tests.unit.schema.spelling import TWO_BRANCHES, ids
from tests.unit.topology.oracles import paper_positions, program_of, walk

LONG_FIRST = TWO_BRANCHES.replace("1: c", "1: c d e")
"""Branch 1 is the longer one here: offsets 14..22, branch 2 22..29, takeaway 29."""


@QUICK
@given(structures())
def test_canonical_layout_is_what_a_recursive_walk_says(structure: Structure):
    tokens, _ = walk(program_of(structure))
    assert [token.token_id for token in tokens] == structure.token_ids
    layout = layout_of(structure.token_ids, structure.prompt_length, structure.vocabulary)
    assert layout.position_ids.tolist() == [token.position for token in tokens]
    assert layout.block.tolist() == [token.block for token in tokens]
    assert layout.branch.tolist() == [token.branch for token in tokens]
    assert layout.forced.tolist() == [token.is_forced for token in tokens]


@QUICK
@given(structures())
def test_paper_layout_has_the_published_positions_and_the_canonical_labels(structure: Structure):
    arguments = (structure.token_ids, structure.prompt_length, structure.vocabulary)
    paper, canonical = layout_of(*arguments, "paper"), layout_of(*arguments)
    assert paper.position_ids.tolist() == paper_positions(*arguments)
    np.testing.assert_array_equal(paper.block, canonical.block)
    np.testing.assert_array_equal(paper.branch, canonical.branch)


@QUICK
@given(structures())
def test_positions_end_at_the_critical_path_of_the_graph(structure: Structure):
    document = parse(structure.response_ids, structure.vocabulary).document
    assert document is not None
    layout = layout_of(structure.token_ids, structure.prompt_length, structure.vocabulary)
    critical_path = execution_graph(document).critical_path_tokens
    assert layout.position_ids.max() + 1 - structure.prompt_length == critical_path


@QUICK
@given(structures())
def test_every_token_is_predicted_by_the_token_before_it_on_its_own_path(structure: Structure):
    layout = layout_of(structure.token_ids, structure.prompt_length, structure.vocabulary)
    predecessor = layout.predecessor
    used = predecessor[predecessor >= 0]
    assert len(set(used.tolist())) == len(used)
    followed = np.flatnonzero(predecessor >= 0)
    # one position further on, and never across siblings
    np.testing.assert_array_equal(
        layout.position_ids[followed], layout.position_ids[predecessor[followed]] + 1
    )
    assert np.all(
        (layout.branch[predecessor[followed]] == layout.branch[followed])
        | (layout.branch[predecessor[followed]] == 0)
    )
    # nothing predicts the first token, the headers of later branches, and the takeaway after a join
    num_roots = 1 + sum(len(block.steps) for block in structure.blocks)
    assert np.count_nonzero(predecessor < 0) == num_roots
    assert np.all(layout.forced[predecessor < 0])


@pytest.mark.parametrize(
    ("convention", "branch_1", "branch_2", "takeaway"),
    [
        # </guideline> is 15 and its newline 16 with a prompt of 3
        ("canonical", 17, 17, 25),  # behind the newline; behind the newline of branch 1
        ("paper", 16, 16, 23),  # on the newline; on the newline of branch 1
    ],
)
def test_positions_of_a_small_response_are_those_computed_by_hand(
    convention, branch_1, branch_2, takeaway
):
    prompt = [SMALL.step_open, SMALL.guideline_open, 39]
    layout = layout_of([*prompt, *ids(LONG_FIRST)], 3, SMALL, convention)
    expected = [
        *range(17),
        *range(branch_1, branch_1 + 8),
        *range(branch_2, branch_2 + 7),
        *range(takeaway, takeaway + 8),
    ]
    assert layout.position_ids.tolist() == expected
    assert layout.block.tolist() == [0] * 17 + [1] * 15 + [0] * 8
    assert layout.branch.tolist() == [0] * 17 + [1] * 8 + [2] * 7 + [0] * 8
    assert np.flatnonzero(layout.predecessor < 0).tolist() == [0, 25, 32]
    assert layout.predecessor[17] == 16
    assert np.flatnonzero(layout.forced).tolist() == [
        *(0, 1, 2, 16),
        *(17, 18, 19, 24),
        *(25, 26, 27, 31),
        *(32, 33),
    ]


def test_predecessors_of_a_truncated_trajectory_need_no_closing():
    block = np.array([0, 0, 1, 1, 1, 1], dtype=np.int32)
    branch = np.array([0, 0, 1, 1, 2, 3], dtype=np.int32)
    assert predecessors(block, branch).tolist() == [-1, 0, 1, 2, -1, -1]
    assert predecessors(block[:0], branch[:0]).tolist() == []


@pytest.mark.parametrize(
    ("block", "branch", "expected"),
    [
        ([0, 1, 2], [0, 1, 1], [-1, 0, -1]),  # a first branch right behind one of another block
        ([1, 2], [2, 1], [-1, -1]),
        ([0, 1, 0], [0, 2, 0], [-1, -1, -1]),  # a later branch right behind the trunk
    ],
)
def test_labels_no_legal_response_has_never_chain_branches(block, branch, expected):
    assert predecessors(np.array(block), np.array(branch)).tolist() == expected


def test_plain_layout_is_sequential():
    layout = plain_layout(4, prompt_length=1)
    assert layout.position_ids.tolist() == [0, 1, 2, 3]
    assert layout.predecessor.tolist() == [-1, 0, 1, 2]
    assert layout.forced.tolist() == [True, False, False, False]
    assert not layout.block.any() and not layout.branch.any()


def test_a_malformed_response_has_no_layout_and_the_message_names_rule_and_token():
    broken = ids(TWO_BRANCHES.replace("NL 2: d", "NL 1: d"))
    with pytest.raises(LayoutError, match=r"response token 22: .* \(wrong_index\)"):
        layout_of([7, 7, *broken], 2, SMALL)
    with pytest.raises(LayoutError, match="no_end"):
        layout_of(ids(TWO_BRANCHES)[:-1], 0, SMALL)
    with pytest.raises(LayoutError, match="prompt of 3 tokens"):
        layout_of([1, 2], 3, SMALL)


def test_a_tag_in_the_prompt_means_nothing_unless_the_prompt_length_is_wrong():
    token_ids = [SMALL.guideline_open, *ids(TWO_BRANCHES)]
    assert layout_of(token_ids, 1, SMALL).block.max() == 1
    with pytest.raises(LayoutError):
        layout_of(token_ids, 0, SMALL)
