"""The evaluation of a hand-made set of rollouts, counted by hand."""

from __future__ import annotations

import json

import pytest

from npr_megatron.data.problems import Problem
from npr_megatron.data.sums import is_faithful
from npr_megatron.errors import InputError
from npr_megatron.evaluation.metrics import evaluate
from npr_megatron.records.trajectory import DecodeMode, FinishReason
from tests.unit.rewards.rollouts import ANSWER, GOOD, HEAD, PLAIN, QUESTION, reader, rollout

PROBLEM = Problem(id="p", question=QUESTION, answer=ANSWER)
WRONG = GOOD.replace("\\boxed{3,7}", "\\boxed{3,8}")
GUESSED = GOOD.replace("1:a:1+2=3;a=3</step>", "1:1;a=3</step>")
NO_BOX = GOOD.replace("\\boxed{3,7}", "3,7")


def measure(responses, mode=DecodeMode.PARALLEL, check=is_faithful):
    return evaluate([rollout(text, mode) for text in responses], [PROBLEM], reader(), check)


def test_shares_are_counted_as_documented():
    result = measure([GOOD, WRONG, GUESSED, NO_BOX, HEAD, PLAIN, PLAIN, PLAIN])
    assert result.num_rollouts == 8
    assert result.validity == 3 / 8  # good, wrong, guessed
    assert result.accuracy == 2 / 8  # good, guessed
    assert result.correct_frac == 5 / 8  # these and the plain ones
    assert result.trigger_rate == 4 / 8  # the valid ones and the one without a box
    assert result.faithfulness == 3 / 8  # good, wrong, without a box
    assert result.num_blocks == 4 / 8
    assert result.branches_per_block == 2.0


def test_lengths_are_means_and_parallel_paths_are_shorter():
    parallel, sequential = measure([GOOD]), measure([GOOD], DecodeMode.SEQUENTIAL)
    num_tokens = rollout(GOOD).num_tokens
    branch = len("<step>\n1:a:1+2=3;a=3</step>\n") - len("<step></step>") + 2
    assert parallel.total_tokens == sequential.total_tokens == num_tokens
    assert sequential.critical_path_tokens == num_tokens
    assert parallel.critical_path_tokens == num_tokens - branch
    assert measure([GOOD, PLAIN]).total_tokens == (num_tokens + rollout(PLAIN).num_tokens) / 2


def test_sequential_text_triggers_by_what_it_writes():
    result = measure([GOOD, PLAIN], DecodeMode.SEQUENTIAL)
    assert result.trigger_rate == 0.5
    assert result.mode is DecodeMode.SEQUENTIAL


def test_parallel_text_that_was_not_executed_does_not_trigger():
    executed = rollout(GOOD)
    unexecuted = rollout(GOOD, block=executed.block * 0, branch=executed.branch * 0)
    result = evaluate([unexecuted], [PROBLEM], reader())
    assert result.validity == 1.0
    assert result.trigger_rate == 0.0


def test_without_a_check_faithfulness_is_unknown_not_zero():
    assert measure([GOOD], check=None).faithfulness is None


def test_no_complete_block_gives_zero_width():
    result = measure([PLAIN, HEAD])
    assert (result.num_blocks, result.branches_per_block) == (0.0, 0.0)


def test_each_rollout_is_held_against_its_own_problem():
    other = Problem(id="q", question="a:1+2;b:3+5?", answer="3,8")
    rollouts = [rollout(GOOD), rollout(WRONG, prompt_id="q"), rollout(GOOD, prompt_id="q")]
    result = evaluate(rollouts, [other, PROBLEM], reader(), is_faithful)
    assert result.accuracy == 2 / 3
    assert result.faithfulness == 1 / 3


def test_an_evaluation_is_plain_json():
    result = measure([GOOD])
    assert json.loads(json.dumps(result.to_json()))["mode"] == "parallel"
    assert json.loads(json.dumps(result.to_json()))["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("rollouts", "message"),
    [
        ([], "none"),
        ([rollout(GOOD), rollout(GOOD, DecodeMode.SEQUENTIAL)], "one by one"),
        ([rollout(GOOD, prompt_id="stranger")], "stranger"),
    ],
)
def test_what_cannot_be_measured_is_refused(rollouts, message):
    with pytest.raises(InputError, match=message):
        evaluate(rollouts, [PROBLEM], reader())


@pytest.mark.parametrize(
    "finish", [FinishReason.ABORTED, FinishReason.TIMEOUT, FinishReason.FAILED]
)
def test_rollouts_that_others_cut_short_are_no_mistakes_of_the_policy(finish):
    rollouts = [rollout(GOOD), rollout(HEAD, finish=finish)]
    with pytest.raises(InputError, match=f"found 1 that were not, first p #0 \\({finish}\\)"):
        evaluate(rollouts, [PROBLEM], reader())
