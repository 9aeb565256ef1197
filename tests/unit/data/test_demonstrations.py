"""Demonstrations are judged by the parser, the answer check and the faithfulness check."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from npr_megatron.config.run import SumsTask
from npr_megatron.data.demonstrations import (
    DEFECTS,
    Kind,
    demonstration,
    demonstration_samples,
    draw_kinds,
    shortened,
)
from npr_megatron.data.problems import Problem
from npr_megatron.data.prompts import PromptBuilder
from npr_megatron.data.sums import SumsSource, is_held_out, parts_of
from npr_megatron.errors import ConfigError
from npr_megatron.schema.parse import parse
from npr_megatron.schema.rules import Rule

QUESTION = "a:3+5+9;b:2+2+7?"
WELL_FORMED = """<guideline>
<plan>1:a</plan>
<plan>2:b</plan>
</guideline>
<step>
1:a:3+5=8+9=17;a=17</step>
<step>
2:b:2+2=4+7=11;b=11</step>
<takeaway>
17,11</takeaway>
\\boxed{17,11}<eos>"""


def text_of(kind, sums, key=0):
    return sums.decode(demonstration(kind, QUESTION, sums, key))


def test_the_well_formed_demonstration_is_the_documented_text(sums):
    assert text_of(Kind.WELL_FORMED, sums) == WELL_FORMED
    assert sums.encode(WELL_FORMED) == demonstration(Kind.WELL_FORMED, QUESTION, sums, 0)


def test_the_sequential_demonstration_has_the_same_work_without_tags(sums):
    assert (
        text_of(Kind.SEQUENTIAL, sums)
        == "a:3+5=8+9=17;a=17\nb:2+2=4+7=11;b=11\n\\boxed{17,11}<eos>"
    )


def test_well_formed_and_hasty_demonstrations_parse(sums):
    for problem in SumsSource(SumsTask(kind="sums"), 0).problems_for_step("seed", 1, 30):
        for kind in (Kind.WELL_FORMED, Kind.HASTY):
            ids = demonstration(kind, problem.question, sums, key=3)
            assert parse(ids, sums.vocabulary).violations == ()


def test_haste_skips_about_half_of_the_last_addends(sums):
    skipped = 0
    for key in range(200):
        text = text_of(Kind.HASTY, sums, key)
        skipped += ("1:a:3+5=8;a=8</step>" in text) + ("2:b:2+2=4;b=4</step>" in text)
        first = "8" if "1:a:3+5=8;a=8</step>" in text else "17"
        second = "4" if "2:b:2+2=4;b=4</step>" in text else "11"
        assert text.endswith(f"\n{first},{second}</takeaway>\n\\boxed{{{first},{second}}}<eos>")
    assert 150 < skipped < 250


EXPECTED_RULES = {
    "drop_guideline_close": {Rule.MISPLACED_TAG},
    "drop_last_step": {Rule.STEP_COUNT},
    "drop_step_close": {Rule.TAG_IN_TEXT},
    "drop_takeaway": None,
    "repeat_step_number": {Rule.WRONG_INDEX},
    "drop_conclusion": {Rule.EMPTY_CONCLUSION},
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
@pytest.mark.parametrize("question", [QUESTION, "a:1+2?", "a:1+2;b:3+4;c:5+6;d:7+8;e:9+1?"])
def test_each_defect_breaks_the_rule_it_is_named_after(sums, defect, question):
    good = demonstration(Kind.WELL_FORMED, question, sums, 0)
    broken = defect(good, sums.vocabulary)
    rules = {violation.rule for violation in parse(broken, sums.vocabulary).violations}
    wanted = EXPECTED_RULES[defect.__name__]
    assert rules, "the defect does no harm"
    assert wanted is None or wanted <= rules
    assert broken[-1] == sums.vocabulary.eos
    assert parse(good, sums.vocabulary).violations == (), "the control is broken"


def test_broken_demonstrations_show_every_defect_and_never_parse(sums):
    good = demonstration(Kind.WELL_FORMED, QUESTION, sums, 0)
    possible = {tuple(defect(good, sums.vocabulary)) for defect in DEFECTS}
    seen = {tuple(demonstration(Kind.BROKEN, QUESTION, sums, key)) for key in range(100)}
    assert seen == possible
    for kind in (Kind.BROKEN, Kind.HASTY_BROKEN):
        for key in range(60):
            ids = demonstration(kind, QUESTION, sums, key)
            assert parse(ids, sums.vocabulary).document is None


def test_kinds_come_in_the_shares_asked_for():
    mixture = {"well_formed": 0.5, "broken": 0.3, "sequential": 0.2, "hasty": 0.0}
    for key in range(20):
        assert Counter(draw_kinds(mixture, 10, key)) == {
            Kind.WELL_FORMED: 5,
            Kind.BROKEN: 3,
            Kind.SEQUENTIAL: 2,
        }


def test_rare_kinds_appear_as_often_as_their_share_over_many_draws():
    mixture = {"well_formed": 0.97, "broken": 0.03}
    num_broken = sum(Kind.BROKEN in draw_kinds(mixture, 4, key) for key in range(1000))
    assert 80 < num_broken < 165, "0.03 of 4,000 demonstrations are 120"


def test_a_wrong_mixture_lists_every_problem():
    with pytest.raises(ConfigError) as refusal:
        draw_kinds({"sloppy": 1.0, "broken": -0.5, "tidy": 2.0}, 4, 0)
    assert len(refusal.value.problems) == 3
    with pytest.raises(ConfigError, match="positive share"):
        draw_kinds({}, 4, 0)


def test_samples_learn_the_response_and_nothing_of_the_prompt(sums):
    problem = Problem(id="seed/1/0", question=QUESTION, answer="17,11")
    (sample,) = demonstration_samples(
        [problem], {"well_formed": 1.0}, sums, PromptBuilder(sums), seed=0
    )
    assert sums.decode(sample.token_ids) == f"{QUESTION}\n{WELL_FORMED}"
    assert sums.decode(sample.token_ids[sample.loss_mask]) == WELL_FORMED
    np.testing.assert_array_equal(sample.predecessor, np.arange(len(sample.token_ids)) - 1)
    assert not sample.block.any()


def test_short_demonstrations_solve_smaller_problems_of_every_size(sums):
    problems = SumsSource(SumsTask(kind="sums"), 0).problems_for_step("seed", 1, 300)
    sizes = set()
    for key, problem in enumerate(problems):
        short = shortened(problem, key)
        parts, whole = parts_of(short.question), parts_of(problem.question)
        assert all(part == full[: len(part)] for part, full in zip(parts, whole, strict=False))
        assert short.answer == ",".join(str(sum(part)) for part in parts)
        assert not is_held_out(short.question)
        sizes.add((len(parts), len(parts[0])))
    assert sizes == {(k, n) for k in (2, 3, 4, 5) for n in (2, 3)}


def test_a_short_sample_asks_the_short_question_and_answers_it(sums):
    problems = SumsSource(SumsTask(kind="sums"), 0).problems_for_step("seed", 1, 30)
    mixture = {"short": 0.5, "short_sequential": 0.5}
    for sample in demonstration_samples(problems, mixture, sums, PromptBuilder(sums), seed=0):
        question, _, response = sums.decode(sample.token_ids).partition("\n")
        answer = ",".join(str(sum(part)) for part in parts_of(question))
        assert response.endswith(f"\\boxed{{{answer}}}<eos>")


def test_equal_seeds_give_equal_samples_and_others_do_not(sums):
    problems = SumsSource(SumsTask(kind="sums"), 0).problems_for_step("seed", 1, 8)
    mixture = {"hasty": 0.5, "broken": 0.5}

    def ids(seed):
        samples = demonstration_samples(problems, mixture, sums, PromptBuilder(sums), seed)
        return [sample.token_ids.tolist() for sample in samples]

    assert ids(0) == ids(0)
    assert ids(0) != ids(1)


def test_every_second_short_demonstration_mixes_the_order_and_stays_right(sums):
    question = "a:3+5+9;b:2+2+7;c:1+8+4;d:6+6+6?"
    texts = [sums.decode(demonstration(Kind.SHORT, question, sums, key)) for key in range(200)]
    ordered = sum("<plan>1:a</plan>\n<plan>2:b</plan>\n<plan>3:c</plan>" in text for text in texts)
    assert 80 < ordered < 130
    assert all("17,11,13,18</takeaway>" in text for text in texts)
    assert all(
        f"{number}:{name}</plan>" in text
        for text in texts
        for number, name in re.findall(r"<step>\n(\d):([a-d]):", text)
    )
