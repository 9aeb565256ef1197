"""The format score: the rows of its table, the floor, and 0.0 for exactly the valid responses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.schema.parse import parse
from npr_megatron.schema.score import FLOOR, FormatLimits, boxed_contents, format_score
from tests.structures import QUICK, SMALL, Structure, damaged_responses, structures
from tests.unit.schema.spelling import TWO_BRANCHES, ids

BOXED = "so it is \\boxed{17}"
FIRST = TWO_BRANCHES.removesuffix("g h EOS")
THREE_BLOCKS = FIRST + FIRST + TWO_BRANCHES


def score(words: str, conclusion_text: str = BOXED, limits: FormatLimits | None = None) -> float:
    return format_score(parse(ids(words), SMALL), conclusion_text, limits)


@QUICK
@given(structures())
def test_valid_responses_score_zero_and_lose_it_without_a_box(structure: Structure):
    result = parse(structure.response_ids, structure.vocabulary)
    assert format_score(result, BOXED) == 0.0
    assert format_score(result, "so it is 17") == -1.0
    assert format_score(result, "\\boxed{ }") == -1.0


@QUICK
@given(damaged_responses(), st.sampled_from([BOXED, ""]))
def test_score_is_zero_exactly_for_documents_with_a_box_and_never_below_the_floor(damaged, text):
    vocabulary, response = damaged
    result = parse(response, vocabulary)
    is_valid = result.document is not None and text == BOXED
    value = format_score(result, text)
    assert (value == 0.0) == is_valid
    assert FLOOR <= value <= 0.0


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        # grave
        ("NL g h EOS", "NL g </plan> h EOS", -1.0),
        ("NL g h EOS", "NL g h", -1.0),
        ("<step> NL 2: d e </step> NL", "", -1.0),
        ("<plan> 1: a </plan> NL <plan> 2: b </plan> NL", "", -1.0),
        ("<takeaway> NL f </takeaway>", "", -1.5),
        ("</guideline> NL <step>", "<step>", -1.5),
        ("<guideline> NL <plan> 1:", "<step> <guideline> NL <plan> 1:", -1.5),
        # small
        ("<plan> 1: a", "<plan> 2: a", -0.4),
        ("<plan> 1: a", "<plan> 1:", -0.4),
        ("<plan> 1: a", "<plan> 1: </step> a", -0.4),
        ("c </step>", "c </plan> </step>", -0.4),
        ("b </plan> NL", "b </plan> NL </plan> NL", -0.4),
        ("<takeaway> NL f", "<takeaway> NL", -0.4),
        ("<plan> 1: a", "a b <plan> 1: a", -0.6),
        ("</step> NL <step>", "</step> NL a b <step>", -0.2),
        ("</guideline> NL <step>", "</guideline> <step>", -0.2),
        ("<guideline> NL <plan> 1:", "a <guideline> NL <plan> 1:", -0.2),
    ],
)
def test_each_defect_costs_what_the_table_says(old, new, expected):
    assert TWO_BRANCHES.count(old) == 1
    assert score(TWO_BRANCHES.replace(old, new)) == pytest.approx(expected)


def test_nothing_at_all_scores_the_floor():
    assert score("", "") == score("EOS", "") == FLOOR == -2.0


def test_text_without_any_block_scores_minus_one_and_a_half():
    assert score("a b c EOS", BOXED) == -1.5


def test_a_block_left_open_behind_a_complete_one_costs_less_than_no_block():
    assert score(FIRST + "<guideline> NL <plan> 1: a EOS", "") == -1.0
    assert score("<guideline> NL <plan> 1: a EOS", "") == -1.5


def test_tags_between_blocks_cost_more_than_behind_the_last():
    assert score(FIRST + "<plan> " + TWO_BRANCHES) == -1.5
    assert score(FIRST + "a " + TWO_BRANCHES) == pytest.approx(-0.2)


def test_a_misplaced_tag_is_loose_where_it_keeps_its_block_from_being_complete():
    without_takeaway = FIRST.replace("<takeaway> NL f </takeaway>", "</takeaway>")
    assert score(FIRST + without_takeaway + "g EOS") == -1.0
    assert score(without_takeaway + TWO_BRANCHES) == -1.5


def test_small_faults_add_up_and_residue_counts_once_per_block():
    two = TWO_BRANCHES.replace("</step> NL <step>", "</step> NL a <step>").replace("1: a", "a")
    assert score(two) == pytest.approx(-0.2 - 0.4)
    guideline = TWO_BRANCHES.replace("NL <plan>", "NL a <plan>")
    assert guideline.count("NL a <plan>") == 2
    assert score(guideline) == pytest.approx(-0.6)
    assert score(guideline.removesuffix("g h EOS") + guideline) == pytest.approx(-1.2)


def test_many_small_faults_stop_at_the_floor():
    broken = THREE_BLOCKS.replace("1: ", "").replace("2: ", "")
    assert len(parse(ids(broken), SMALL).violations) == 12
    assert score(broken) == FLOOR


def test_texts_below_their_minimum_cost_like_empty_ones():
    assert score(TWO_BRANCHES, limits=FormatLimits(min_plan_tokens=2)) == pytest.approx(-0.8)
    assert score(TWO_BRANCHES, limits=FormatLimits(min_step_tokens=2)) == pytest.approx(-0.4)
    assert score(TWO_BRANCHES, limits=FormatLimits(min_takeaway_tokens=2)) == pytest.approx(-0.4)
    assert score(TWO_BRANCHES, limits=FormatLimits(min_step_tokens=1)) == 0.0


def test_boxes_match_their_braces():
    assert boxed_contents("\\boxed{\\frac{1}{2}} and \\boxed{}") == ("\\frac{1}{2}", "")
    assert boxed_contents("\\boxed{1") == ("",)
    assert boxed_contents("boxed 1") == ()
