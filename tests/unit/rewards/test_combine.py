"""Rewards of both stages and the structural filter, on rollouts written by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from npr_megatron.records.trajectory import DecodeMode, FinishReason
from npr_megatron.rewards.combine import score_npr, score_zero
from npr_megatron.rewards.structure import LAYOUT_MISMATCH, drop_reason
from tests.unit.rewards.rollouts import (
    ANSWER,
    GOOD,
    HEAD,
    PLAIN,
    STEPS,
    TAIL,
    reader,
    rollout,
    tokenizer,
)

SEQUENTIAL = DecodeMode.SEQUENTIAL
OF_OTHERS = (FinishReason.ABORTED, FinishReason.TIMEOUT, FinishReason.FAILED)
WRONG = GOOD.replace("\\boxed{3,7}", "\\boxed{3,8}")
NO_TAKEAWAY = HEAD + STEPS + "\\boxed{3,7}<eos>"
NO_BOX = HEAD + STEPS + "<takeaway>\n3,7</takeaway>\n3,7<eos>"


def test_npr_can_count_malformed_rollouts_as_wrong_whatever_their_answer():
    score = score_npr(rollout(NO_TAKEAWAY), ANSWER, reader(), malformed="wrong")
    assert score.kept
    assert score.reward == -1.0
    assert score_npr(rollout(GOOD), ANSWER, reader(), malformed="wrong").reward == 1.0


def test_faults_that_are_not_the_models_are_dropped_even_where_malformed_counts_as_wrong():
    misplaced = rollout(GOOD, SEQUENTIAL)
    cut_short = [dataclasses.replace(rollout(NO_TAKEAWAY), finish=finish) for finish in OF_OTHERS]
    for trajectory in (misplaced, *cut_short):
        assert not score_npr(trajectory, ANSWER, reader(), malformed="wrong").kept


@pytest.mark.parametrize("finish", OF_OTHERS)
def test_zero_learns_nothing_from_what_others_cut_short(finish):
    score = score_zero(rollout(HEAD, SEQUENTIAL, finish=finish), ANSWER, reader())
    assert (score.kept, score.drop_reason) == (False, finish.value)
    assert score_zero(rollout(HEAD, SEQUENTIAL), ANSWER, reader()).kept, "out of budget: its own"


@pytest.mark.parametrize(("response", "reward"), [(GOOD, 1.0), (WRONG, -1.0)])
def test_zero_rewards_the_answer_once_the_format_is_kept(response, reward):
    score = score_zero(rollout(response, SEQUENTIAL), ANSWER, reader())
    assert score.is_valid
    assert score.reward == reward
    assert score.kept


@pytest.mark.parametrize("response", [PLAIN, NO_TAKEAWAY, NO_BOX, GOOD.removesuffix("<eos>")])
def test_zero_punishes_a_broken_format_even_if_the_answer_is_right(response):
    score = score_zero(rollout(response, SEQUENTIAL), ANSWER, reader())
    assert not score.is_valid
    assert -3.0 <= score.reward < -1.0, "worse than any well-formed answer"
    assert score.reward == score.format_score - 1.0
    assert score.kept, "ZERO learns from every rollout"
    assert score.is_correct is ("boxed{3,7}" in response)


@pytest.mark.parametrize(("response", "reward"), [(GOOD, 1.0), (WRONG, -1.0), (NO_BOX, -1.0)])
def test_npr_rewards_the_answer_alone(response, reward):
    score = score_npr(rollout(response), ANSWER, reader())
    assert score.reward == reward
    assert score.kept


def test_npr_drops_malformed_rollouts_instead_of_punishing_them():
    score = score_npr(rollout(NO_TAKEAWAY), ANSWER, reader())
    assert not score.kept
    assert score.reward == 1.0, "the answer is right; the filter is another matter"


@pytest.mark.parametrize(
    ("finish", "detail", "reason"),
    [
        (FinishReason.LENGTH, "", "length"),
        (FinishReason.CRITICAL_PATH, "", "critical_path"),
        (FinishReason.ABORTED, "", "aborted"),
        (FinishReason.TIMEOUT, "", "timeout"),
        (FinishReason.FAILED, "weight version 9 gave NaN", "weight version 9 gave NaN"),
        (FinishReason.MALFORMED, "step_count", "step_count"),
    ],
)
def test_only_rollouts_that_stopped_by_themselves_are_kept(finish, detail, reason):
    trajectory = rollout(GOOD, finish=finish, finish_detail=detail)
    assert drop_reason(trajectory, tokenizer().vocabulary) == reason


def test_a_rollout_that_claims_a_stop_but_does_not_parse_is_dropped():
    trajectory = rollout(NO_TAKEAWAY, finish=FinishReason.STOP)
    assert drop_reason(trajectory, tokenizer().vocabulary) == "malformed"


@pytest.mark.parametrize("stream", ["position_ids", "block", "branch"])
def test_a_token_placed_elsewhere_than_the_layout_rule_says_is_noticed(stream):
    good = rollout(GOOD)
    assert drop_reason(good, tokenizer().vocabulary) == ""
    moved = np.array(getattr(good, stream))
    moved[-1] += 1
    assert drop_reason(rollout(GOOD, **{stream: moved}), tokenizer().vocabulary) == LAYOUT_MISMATCH


def test_a_parallel_text_decoded_sequentially_is_no_parallel_rollout():
    trajectory = rollout(GOOD, SEQUENTIAL)
    assert drop_reason(trajectory, tokenizer().vocabulary) == LAYOUT_MISMATCH


def test_the_other_position_convention_is_noticed():
    assert drop_reason(rollout(GOOD), tokenizer().vocabulary, "paper") == LAYOUT_MISMATCH


def test_the_reader_hands_out_what_steps_and_takeaways_say():
    trajectory = rollout(HEAD + STEPS + "<takeaway>\n3,7</takeaway>\n" + GOOD)
    reading = reader().read(trajectory.response_ids)
    strings = reader().block_strings(trajectory.response_ids, reading)
    assert strings == ((("a:1+2=3;a=3", "b:3+4=7;b=7"), "3,7"),) * 2
    assert reading.text.endswith(TAIL)
