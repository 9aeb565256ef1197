"""The sums task: hand-written examples and properties over drawn problems."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from npr_megatron.config.run import SumsTask
from npr_megatron.data.sums import (
    SumsSource,
    draw_parts,
    is_faithful,
    is_held_out,
    parts_of,
    question_of,
    results_of,
    work_of,
    works_of,
)
from npr_megatron.errors import InputError

TASK = SumsTask(kind="sums", min_parts=2, max_parts=4, addends=3, min_addend=1, max_addend=9)
PARTS = ((3, 5, 9), (2, 2, 7), (1, 8, 4))


def test_a_problem_is_spelt_as_documented():
    assert question_of(PARTS) == "a:3+5+9;b:2+2+7;c:1+8+4?"
    assert work_of("a", PARTS[0]) == "a:3+5=8+9=17;a=17"
    assert results_of(PARTS) == "17,11,13"


def test_the_question_is_read_back():
    assert parts_of(question_of(PARTS)) == PARTS


@pytest.mark.parametrize("question", ["", "?", "a:3+5", "b:3+5?", "a:3+x?", "a:03+5?", "1+2?"])
def test_a_foreign_question_is_refused(question):
    with pytest.raises(InputError, match="question of the sums task"):
        parts_of(question)


def test_work_is_true_arithmetic():
    for key in range(50):
        for part in draw_parts(TASK, key):
            chain, _, result = work_of("b", part).partition(";b=")
            equations = re.findall(r"(?=(?:^|=|:)(\d+\+\d+=\d+))", chain)
            assert len(equations) == TASK.addends - 1
            for equation in equations:
                left, right = equation.split("=")
                assert eval(left) == int(right)
            assert int(chain.rpartition("=")[2]) == int(result) == sum(part)


def test_drawn_problems_cover_the_whole_range_and_nothing_else():
    problems = [draw_parts(TASK, key) for key in range(2000)]
    sizes = Counter(map(len, problems))
    addends = Counter(a for parts in problems for part in parts for a in part)
    assert set(sizes) == {2, 3, 4}
    assert set(addends) == set(range(1, 10))
    assert max(sizes.values()) < 1.15 * min(sizes.values())
    assert max(addends.values()) < 1.15 * min(addends.values())
    assert {len(part) for parts in problems for part in parts} == {3}


def test_good_work_is_faithful_in_one_block_or_in_two():
    question, works = question_of(PARTS), works_of(PARTS)
    assert is_faithful(question, [(works, "17,11,13")])
    assert is_faithful(question, [(works[:2], "17,11"), (works[2:], "13")])
    assert is_faithful(question, [([works[2], works[0], works[1]], "17,11,13")])


@pytest.mark.parametrize(
    "blocks",
    [
        [],
        [(["a:3+5=8+9=17;a=17", "b:2+2=4+7=11;b=11"], "17,11")],
        [(["a:3+5=8+9=17;a=17", "b:2+2=4+7=11;b=11", "c:1+8=9;c=9"], "17,11,13")],
        [(["a:3+5=8+9=17;a=17", "b:2+2=4+7=11;b=11", "c:1+8=9+4=13;c=13"], "17,11,14")],
        [(["b:2+2=4+7=11;b=11", "a:3+5=8+9=17;a=17", "c:1+8=9+4=13;c=13"], "11,17,13")],
        [(["b:2+2=4+7=11;b=11", "b:2+2=4+7=11;b=11", "c:1+8=9+4=13;c=13"], "11,13")],
        [
            (["a:3+5=8+9=17;a=17", "b:2+2=4+7=11;b=11", "c:1+8=9+4=13;c=13"], "17,11,13"),
            (["c:1+8=9+4=13;c=13"], "13"),
        ],
    ],
)
def test_skipped_wrong_swapped_or_repeated_work_is_not_faithful(blocks):
    assert not is_faithful(question_of(PARTS), blocks)


def test_held_out_problems_are_distinct_and_never_drawn_for_training():
    small = SumsTask(kind="sums", min_parts=1, max_parts=2, addends=2, min_addend=1, max_addend=4)
    source = SumsSource(small, seed=0)
    held_out = [problem.question for problem in source.held_out(12)]
    trained = {p.question for step in range(20) for p in source.problems_for_step("zero", step, 16)}
    assert len(set(held_out)) == 12
    assert all(map(is_held_out, held_out))
    assert not trained & set(held_out)
    assert len(trained) > 100, "the control is empty"


def test_about_one_question_in_sixteen_is_held_out():
    questions = {question_of(draw_parts(TASK, key)) for key in range(4000)}
    assert 0.05 < sum(map(is_held_out, questions)) / len(questions) < 0.075


def test_more_held_out_problems_than_exist_are_refused():
    tiny = SumsTask(kind="sums", min_parts=1, max_parts=1, addends=2, min_addend=1, max_addend=3)
    with pytest.raises(InputError, match="5 held-out problems"):
        SumsSource(tiny, seed=0).held_out(5)


def test_seed_stage_and_step_name_the_problems():
    def questions(seed, stage, step, count=8):
        problems = SumsSource(TASK, seed).problems_for_step(stage, step, count)
        return [problem.question for problem in problems]

    base = questions(0, "zero", 3)
    assert questions(0, "zero", 3) == base
    assert questions(0, "zero", 3, count=4) == base[:4]
    for other in (questions(1, "zero", 3), questions(0, "npr", 3), questions(0, "zero", 4)):
        assert not set(other) & set(base)


def test_held_out_problems_are_the_same_for_every_seed():
    first, second = (SumsSource(TASK, seed).held_out(20) for seed in (0, 1))
    assert first == second


def test_answers_are_the_sums():
    for problem in SumsSource(TASK, 0).problems_for_step("zero", 1, 20):
        terms = [term.partition(":")[2] for term in problem.question.strip("?").split(";")]
        assert problem.answer == ",".join(str(eval(term)) for term in terms)
