"""Parsing gives back what was rendered, agrees with the grammar, and goes on after a violation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.errors import InputError
from npr_megatron.schema.grammar import Grammar
from npr_megatron.schema.parse import Block, Parser, Span, parse
from npr_megatron.schema.render import render, texts_of
from npr_megatron.schema.rules import Rule, Violation
from tests.structures import QUICK, SMALL, WORDS, Structure, damaged_responses, structures
from tests.unit.schema.spelling import TWO_BRANCHES, ids

WORD = (WORDS[0],)


def rules(words: str) -> list[tuple[Rule, int]]:
    return [(v.rule, v.position) for v in parse(ids(words), SMALL).violations]


@QUICK
@given(structures())
def test_parsing_gives_back_the_rendered_texts(structure: Structure):
    response = structure.response_ids
    document = parse(response, structure.vocabulary).document
    assert document is not None
    blocks, conclusion = texts_of(document, response)
    assert [(*map(tuple, b.plans),) for b in blocks] == [b.plans for b in structure.blocks]
    assert [(*map(tuple, b.steps),) for b in blocks] == [b.steps for b in structure.blocks]
    assert [tuple(b.takeaway) for b in blocks] == [b.takeaway for b in structure.blocks]
    assert tuple(conclusion) == structure.conclusion
    assert render(blocks, conclusion, structure.vocabulary) == response
    assert document.num_tokens == len(response)


@QUICK
@given(damaged_responses())
def test_parser_verdict_is_what_stepping_the_grammar_says(damaged):
    vocabulary, response = damaged
    grammar = Grammar(vocabulary)
    state, broken = grammar.start, []
    for position, token_id in enumerate(response):
        state, rule = grammar.advance(state, token_id)
        broken += [(position, rule)] if rule else []
    end = grammar.end_rule(state)
    broken += [(len(response), end)] if end else []
    # neighbouring repeats are reported once
    expected = [
        Violation(position, rule) for position, rule in broken if (position - 1, rule) not in broken
    ]
    result = parse(response, vocabulary)
    assert list(result.violations) == expected
    assert (result.document is None) == bool(expected)


@QUICK
@given(structures(max_blocks=2), st.data())
def test_dropping_any_tag_is_refused(structure: Structure, data):
    response = structure.response_ids
    tags = [i for i, token_id in enumerate(response) if token_id in structure.vocabulary.tags]
    del response[data.draw(st.sampled_from(tags))]
    assert parse(response, structure.vocabulary).document is None


@QUICK
@given(structures(max_blocks=2), st.data())
def test_doubling_any_tag_is_refused_there(structure: Structure, data):
    response = structure.response_ids
    tags = [i for i, token_id in enumerate(response) if token_id in structure.vocabulary.tags]
    at = data.draw(st.sampled_from(tags))
    response.insert(at, response[at])
    assert parse(response, structure.vocabulary).violations[0].position == at + 1


@QUICK
@given(structures(), st.data())
def test_a_prefix_is_legal_so_far_but_no_document(structure: Structure, data):
    response = structure.response_ids
    stop = data.draw(st.integers(0, len(response) - 1))
    result = parse(response[:stop], structure.vocabulary)
    rule = Rule.NO_END if stop else Rule.EMPTY_RESPONSE
    assert result.violations == (Violation(stop, rule),)


def test_spans_of_a_small_response_are_those_counted_by_hand():
    document = parse(ids(TWO_BRANCHES), SMALL).document
    assert document is not None
    assert document.blocks == (
        Block(
            guideline=Span(0, 13),
            plans=(Span(4, 5), Span(9, 10)),
            steps=(Span(17, 18), Span(23, 25)),
            takeaway=Span(29, 30),
        ),
    )
    assert document.blocks[0].branches == (Span(14, 20), Span(20, 27))
    assert document.blocks[0].extent == Span(0, 31)
    assert document.conclusion == Span(32, 34)
    assert document.num_tokens == 35


def test_streaming_results_are_those_of_the_whole_prefix():
    grammar = Grammar(SMALL)
    response = ids(TWO_BRANCHES.replace("d e </step>", "d </plan> e"))
    parser = Parser(grammar)
    for stop, token_id in enumerate(response, start=1):
        parser.feed(token_id)
        assert parser.result() == parse(response[:stop], SMALL)


def test_several_defects_are_reported_each_once():
    words = TWO_BRANCHES.replace("NL <plan> 2: b", "a b c NL <plan> 1: b").replace("NL f", "NL")
    assert rules(words) == [
        (Rule.TEXT_IN_GUIDELINE, 6),
        (Rule.WRONG_INDEX, 11),
        (Rule.EMPTY_TEXT, 32),
    ]


def test_a_tag_in_a_text_is_skipped_and_the_block_still_counts():
    result = parse(ids(TWO_BRANCHES.replace("d e", "d <plan> e")), SMALL)
    assert [v.rule for v in result.violations] == [Rule.TAG_IN_TEXT]
    assert result.blocks[0].steps == (Span(17, 18), Span(23, 26))
    assert result.document is None


def test_a_missing_newline_costs_one_violation_and_no_text():
    result = parse(ids(TWO_BRANCHES.replace("<takeaway> NL f", "<takeaway> f")), SMALL)
    assert [v.rule for v in result.violations] == [Rule.SPACING]
    assert result.blocks[0].takeaway == Span(28, 29)
    assert rules(TWO_BRANCHES.replace("<step> NL 1:", "<step> _ NL 1:")) == [(Rule.SPACING, 15)]


def test_a_blank_for_an_index_leaves_the_text_empty():
    assert rules(TWO_BRANCHES.replace("<plan> 1: a", "<plan> NL")) == [
        (Rule.WRONG_INDEX, 3),
        (Rule.EMPTY_TEXT, 4),
    ]


def test_a_lone_tag_is_not_an_empty_response():
    assert rules("</plan> EOS") == [(Rule.STRAY_TAG, 0), (Rule.OPEN_BLOCK, 1)]


def test_a_missing_closing_tag_costs_one_violation_where_the_next_part_opens():
    assert rules(TWO_BRANCHES.replace("c </step> NL", "c NL")) == [(Rule.TAG_IN_TEXT, 19)]
    assert rules(TWO_BRANCHES.replace("d e </step> NL", "d e NL")) == [(Rule.TAG_IN_TEXT, 26)]


def test_a_guideline_inside_a_step_starts_over_and_only_complete_blocks_are_kept():
    inner = TWO_BRANCHES.removesuffix(" NL g h EOS")
    result = parse(ids(TWO_BRANCHES.replace("1: c", f"1: c {inner}")), SMALL)
    assert result.violations[0] == Violation(18, Rule.NESTED_GUIDELINE)
    assert [block.guideline.start for block in result.blocks] == [18]


def test_conclusion_of_a_broken_response_is_what_follows_its_last_block():
    result = parse(ids(TWO_BRANCHES.replace("1: a", "a").replace("g h EOS", "g </step> h")), SMALL)
    assert [v.rule for v in result.violations] == [Rule.WRONG_INDEX, Rule.STRAY_TAG, Rule.NO_END]
    assert result.conclusion == Span(31, 34)
    assert parse(ids("<guideline> NL EOS"), SMALL).conclusion is None
    reopened = TWO_BRANCHES.replace("g h EOS", "<guideline> NL EOS")
    assert parse(ids(reopened), SMALL).conclusion is None


def test_a_closing_tag_that_closes_nothing_adds_neither_text_nor_block():
    result = parse(ids(TWO_BRANCHES.replace("b </plan> NL", "b </plan> NL </plan> NL")), SMALL)
    assert [v.rule for v in result.violations] == [Rule.MISPLACED_TAG]
    assert result.blocks[0].plans == (Span(4, 5), Span(9, 10))
    without_takeaway = TWO_BRANCHES.replace("<takeaway> NL f </takeaway>", "</takeaway>")
    assert parse(ids(without_takeaway), SMALL).blocks == ()


def test_message_names_the_token_and_says_what_is_wrong():
    violation = parse(ids("EOS"), SMALL).violations[0]
    assert violation.message == "response token 0: the response holds nothing"
    assert all(Violation(0, rule).message for rule in Rule)


@pytest.mark.parametrize(
    ("block", "conclusion", "problem"),
    [
        (((WORD, WORD), (WORD,), WORD), WORD, "block 1 has 2 plans and 1 steps"),
        (((), (), WORD), WORD, "block 1 has 0 plans"),
        (((WORD,) * 6, (WORD,) * 6, WORD), WORD, "within 1..5"),
        (((WORD,), ((SMALL.newline,),), WORD), WORD, "step 1 of block 1 is empty"),
        (((WORD,), (WORD,), (*WORD, SMALL.step_open)), WORD, "the takeaway of block 1 holds a tag"),
        (((WORD,), (WORD,), WORD), (*WORD, SMALL.eos), "the conclusion holds a tag or the end"),
    ],
)
def test_rendering_refuses_texts_that_no_response_can_say(block, conclusion, problem):
    with pytest.raises(InputError, match=problem):
        render([block], conclusion, SMALL)


def test_rendering_refuses_a_response_without_blocks():
    with pytest.raises(InputError, match="there is no block"):
        render([], WORD, SMALL)
