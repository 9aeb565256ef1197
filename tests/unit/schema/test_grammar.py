"""The automaton against a regular expression, against hand-made examples, and branch by branch."""

from __future__ import annotations

import re

import pytest
from hypothesis import given

from npr_megatron.schema.grammar import Grammar, Phase, State
from npr_megatron.schema.rules import Rule
from npr_megatron.schema.tags import Tag, Vocabulary
from tests.structures import (
    NUM_IDS,
    QUICK,
    SMALL,
    SPLIT,
    Structure,
    damaged_responses,
    structures,
)
from tests.unit.schema.spelling import TWO_BRANCHES, ids

BLOCK = TWO_BRANCHES.removesuffix(" NL g h EOS")


def first_broken_rule(response_ids: list[int], vocabulary: Vocabulary) -> tuple[Rule, int] | None:
    grammar = Grammar(vocabulary)
    state = grammar.start
    for position, token_id in enumerate(response_ids):
        state, rule = grammar.advance(state, token_id)
        if rule is not None:
            return rule, position
    rule = grammar.end_rule(state)
    return None if rule is None else (rule, len(response_ids))


def language(vocabulary: Vocabulary) -> re.Pattern[str]:
    """The tag language as a regular expression over one character per id: the oracle."""

    def spell(*token_ids: int) -> str:
        return "".join(re.escape(chr(0x4E00 + token_id)) for token_id in token_ids)

    v = vocabulary
    reserved = {*v.tags, v.eos}
    blank = {*v.blank_ids, v.newline}
    anything = spell(*(i for i in range(NUM_IDS) if i not in reserved))
    word = spell(*(i for i in range(NUM_IDS) if i not in reserved | blank))
    text = f"[{anything}]*[{word}][{anything}]*"
    line = spell(v.newline)
    blocks = []
    for num_plans in range(1, v.max_plans + 1):
        plans = "".join(
            spell(v.plan_open, *index) + text + spell(v.plan_close) + line
            for index in v.index_ids[:num_plans]
        )
        steps = "".join(
            spell(v.step_open, v.newline, *index) + text + spell(v.step_close) + line
            for index in v.index_ids[:num_plans]
        )
        blocks.append(
            spell(v.guideline_open, v.newline)
            + plans
            + spell(v.guideline_close, v.newline)
            + steps
            + spell(v.takeaway_open, v.newline)
            + text
            + spell(v.takeaway_close)
        )
    return re.compile(f"((?:{'|'.join(blocks)}){line}?)+{text}{spell(v.eos)}")


LANGUAGES = {vocabulary: language(vocabulary) for vocabulary in (SMALL, SPLIT)}


def in_language(response_ids: list[int], vocabulary: Vocabulary) -> bool:
    text = "".join(chr(0x4E00 + token_id) for token_id in response_ids)
    return LANGUAGES[vocabulary].fullmatch(text) is not None


@QUICK
@given(structures())
def test_rendered_responses_are_legal_and_in_the_language(structure: Structure):
    response = structure.response_ids
    assert in_language(response, structure.vocabulary)
    assert first_broken_rule(response, structure.vocabulary) is None


@QUICK
@given(damaged_responses())
def test_automaton_and_regular_expression_agree_on_damaged_responses(damaged):
    vocabulary, response = damaged
    is_legal = first_broken_rule(response, vocabulary) is None
    assert is_legal == in_language(response, vocabulary)


@pytest.mark.parametrize(
    ("old", "new", "rule", "position"),
    [
        ("<guideline> NL <plan> 1:", "a <guideline> NL <plan> 1:", Rule.TEXT_OUTSIDE_BLOCK, 0),
        ("<guideline> NL <plan> 1:", "NL <guideline> NL <plan> 1:", Rule.SPACING, 0),
        ("<guideline> NL <plan> 1:", "NL <plan> 1:", Rule.SPACING, 0),
        ("<guideline> NL <plan> 1:", "<plan> 1:", Rule.STRAY_TAG, 0),
        ("<guideline> NL <plan> 1:", "<guideline> <plan> 1:", Rule.SPACING, 1),
        ("<plan> 1: a", "a <plan> 1: a", Rule.TEXT_IN_GUIDELINE, 2),
        ("<plan> 1: a", "<plan> 2: a", Rule.WRONG_INDEX, 3),
        ("<plan> 1: a", "<plan> a", Rule.WRONG_INDEX, 3),
        ("<plan> 1: a", "<plan> 1:", Rule.EMPTY_TEXT, 4),
        ("<plan> 1: a", "<plan> 1: _ NL", Rule.EMPTY_TEXT, 6),
        ("1: a </plan> NL <plan>", "1: a NL <plan>", Rule.TAG_IN_TEXT, 6),
        ("1: a </plan> NL <plan>", "1: a </plan> NL NL <plan>", Rule.SPACING, 7),
        ("<plan> 2: b </plan>", "<step> 2: b </plan>", Rule.MISPLACED_TAG, 7),
        ("</guideline> NL <step>", "</guideline> <step>", Rule.SPACING, 13),
        ("</guideline> NL <step>", "NL <step>", Rule.SPACING, 12),
        ("</guideline> NL <step>", "<step>", Rule.MISPLACED_TAG, 12),
        ("</guideline> NL <step>", "</guideline> NL a <step>", Rule.TEXT_BETWEEN_STEPS, 14),
        ("<step> NL 1:", "<step> 1:", Rule.SPACING, 15),
        ("<step> NL 1:", "<step> NL 2:", Rule.WRONG_INDEX, 16),
        ("c </step>", "c <guideline> </step>", Rule.NESTED_GUIDELINE, 18),
        ("c </step>", "c </plan> </step>", Rule.TAG_IN_TEXT, 18),
        ("c </step>", "c EOS </step>", Rule.OPEN_BLOCK, 18),
        ("d e </step> NL", "d e </step>", Rule.SPACING, 26),
        ("d e </step> NL", "d e </step> NL <step> NL 3: e </step> NL", Rule.STEP_COUNT, 27),
        ("<step> NL 2: d e </step> NL", "", Rule.STEP_COUNT, 20),
        ("<takeaway> NL f", "<takeaway> f", Rule.SPACING, 28),
        ("<takeaway> NL f", "<takeaway> NL", Rule.EMPTY_TEXT, 29),
        ("<takeaway> NL f", "<takeaway> NL <step> f", Rule.TAG_IN_TEXT, 29),
        ("NL g h EOS", "NL g <guideline> EOS", Rule.TEXT_OUTSIDE_BLOCK, 33),
        ("NL g h EOS", "NL g </plan> EOS", Rule.STRAY_TAG, 33),
        ("NL g h EOS", "NL _ EOS", Rule.EMPTY_CONCLUSION, 33),
        ("NL g h EOS", "EOS", Rule.EMPTY_CONCLUSION, 31),
        ("NL g h EOS", "NL g h", Rule.NO_END, 34),
        ("NL g h EOS", "NL g h EOS NL", Rule.AFTER_END, 35),
    ],
)
def test_each_defect_breaks_its_rule_at_the_token_that_proves_it(old, new, rule, position):
    assert TWO_BRANCHES.count(old) == 1
    defective = ids(TWO_BRANCHES.replace(old, new))
    assert first_broken_rule(defective, SMALL) == (rule, position)


@pytest.mark.parametrize(
    ("words", "rule", "position"),
    [
        ("", Rule.EMPTY_RESPONSE, 0),
        ("EOS", Rule.EMPTY_RESPONSE, 0),
        ("<guideline> NL </guideline>", Rule.NO_PLANS, 2),
        ("<guideline> EOS", Rule.OPEN_BLOCK, 1),
        (f"{BLOCK} NL {BLOCK} a EOS", None, None),
        (f"{BLOCK} {BLOCK} a EOS", None, None),
        (f"{BLOCK} NL NL {BLOCK} a EOS", Rule.SPACING, 33),
        (f"{BLOCK} _ {BLOCK} a EOS", Rule.SPACING, 32),
        (f"{BLOCK} NL a {BLOCK} a EOS", Rule.TEXT_OUTSIDE_BLOCK, 33),
    ],
)
def test_what_stands_around_blocks_decides_the_rule(words, rule, position):
    assert first_broken_rule(ids(words), SMALL) == (None if rule is None else (rule, position))


def test_one_plan_more_than_the_vocabulary_can_number_is_refused():
    plans = " NL ".join(f"<plan> {i}: a </plan>" for i in range(1, 6))
    legal = ids(f"<guideline> NL {plans} NL </guideline>")
    assert first_broken_rule(legal, SMALL) == (Rule.NO_END, len(legal))
    too_many = [*legal[:-1], SMALL.plan_open]
    assert first_broken_rule(too_many, SMALL) == (Rule.TOO_MANY_PLANS, len(legal) - 1)


def test_newline_behind_a_takeaway_is_optional():
    for words in (TWO_BRANCHES, TWO_BRANCHES.replace("</takeaway> NL", "</takeaway>")):
        assert first_broken_rule(ids(words), SMALL) is None


@QUICK
@given(structures())
def test_branches_stepped_on_their_own_meet_the_states_of_the_whole_response(structure: Structure):
    grammar = Grammar(structure.vocabulary)
    whole, state = [], grammar.start
    for token_id in structure.response_ids:
        state, _ = grammar.advance(state, token_id)
        whole.append(state)

    alone: list[State] = []
    state = grammar.start
    for block in structure.blocks:
        while not state.at_fork:
            state, rule = grammar.advance(state, structure.response_ids[len(alone)])
            assert rule is None
            alone.append(state)
        fork = state
        assert fork.num_plans == len(block.steps)
        for number, step in enumerate(block.steps, start=1):
            branch = grammar.branch_start(fork, number)
            header = structure.vocabulary.step_header(number)
            alone += whole[len(alone) : len(alone) + len(header) - 1]
            alone.append(branch)
            for token_id in (*step, structure.vocabulary.step_close, structure.vocabulary.newline):
                assert branch.in_branch
                branch, rule = grammar.advance(branch, token_id)
                assert rule is None
                alone.append(branch)
            assert not branch.in_branch
        state = grammar.after_join(fork)
        assert state.at_join and state == alone[-1]
    while len(alone) < len(whole):
        state, _ = grammar.advance(state, structure.response_ids[len(alone)])
        alone.append(state)
    assert alone == whole
    assert state.is_terminal


def test_a_branch_may_not_open_a_guideline_or_end_the_response():
    grammar = Grammar(SMALL)
    fork = State(Phase.BRANCHES, num_plans=3)
    branch, _ = grammar.advance(grammar.branch_start(fork, 3), ids("a")[0])
    assert grammar.advance(branch, SMALL.guideline_open)[1] is Rule.NESTED_GUIDELINE
    assert grammar.advance(branch, SMALL.eos)[1] is Rule.OPEN_BLOCK
    assert grammar.legal_tags(branch) == {Tag.STEP_CLOSE}


@QUICK
@given(structures())
def test_forced_ids_spell_exactly_what_follows(structure: Structure):
    grammar = Grammar(structure.vocabulary)
    response, state = structure.response_ids, grammar.start
    num_forced = 0
    for position, token_id in enumerate(response):
        forced = grammar.forced_ids(state)
        assert tuple(response[position : position + len(forced)]) == forced
        assert bool(forced) == state.next_is_forced
        num_forced += bool(forced)
        state, _ = grammar.advance(state, token_id)
    # fork newline, takeaway header, and per branch: header (open, newline, index), closing newline
    index_size = len(structure.vocabulary.index_ids[0])
    assert num_forced == sum(3 + (3 + index_size) * len(block.steps) for block in structure.blocks)


def test_legal_tags_follow_the_block():
    grammar = Grammar(SMALL)
    state, seen = grammar.start, []
    for token_id in ids(TWO_BRANCHES):
        legal = grammar.legal_tags(state)
        if token_id in SMALL.tags:
            assert SMALL.tags[token_id] in legal
            seen.append(len(legal))
        state, _ = grammar.advance(state, token_id)
    # only behind a plan there is a choice: another plan, or the end of the guideline
    assert seen == [1, 1, 1, 2, 1, 2, 1, 1, 1, 1, 1, 1]
    assert grammar.legal_tags(state) == frozenset()


@pytest.mark.parametrize("vocabulary", [SMALL, SPLIT])
def test_states_are_finitely_many_and_none_chokes_on_any_token(vocabulary: Vocabulary):
    grammar = Grammar(vocabulary)
    reached, frontier = {grammar.start}, [grammar.start]
    while frontier:
        state = frontier.pop()
        for token_id in range(NUM_IDS):
            following, _ = grammar.advance(state, token_id)
            if following not in reached:
                reached.add(following)
                frontier.append(following)
        assert (grammar.end_rule(state) is None) == state.is_terminal
    assert len(reached) < 2000
