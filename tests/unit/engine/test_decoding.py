"""What an engine writes: structure, places, log-probs, budgets, reasons to end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.records.trajectory import DecodeMode, FinishReason
from npr_megatron.schema.render import BlockTexts, render
from npr_megatron.topology.layout import layout_of, predecessors
from tests.engines import (
    UNTIED,
    request_for,
    run_one,
    skeleton_of,
    steered_weights,
    teacher_of,
    tiny_engine,
)
from tests.structures import QUICK, SMALL, SPLIT, WORDS, Structure, structures

PROMPT = (20, 2, 21, 9)
BLOCKS = (
    BlockTexts(((20,), (21, 22), (23,)), ((24,), (25, 26, 27), (28, 29)), (30, 31)),
    BlockTexts(((32,), (33,)), ((34, 35, 36, 37), (38,)), (39,)),
)
RESPONSE = render(BLOCKS, (20, 25), SMALL)
TEACHER = teacher_of([*PROMPT, *RESPONSE], len(PROMPT), SMALL)
LAYOUT = layout_of([*PROMPT, *RESPONSE], len(PROMPT), SMALL)
CRITICAL_PATH = int(LAYOUT.position_ids.max()) + 1 - len(PROMPT)


@QUICK
@given(structures())
def test_a_led_engine_writes_the_layout_and_the_logprobs_of_one_masked_pass(
    structure: Structure,
) -> None:
    engine = tiny_engine(vocabulary=structure.vocabulary)
    token_ids, length = structure.token_ids, structure.prompt_length
    teacher = teacher_of(token_ids, length, structure.vocabulary)
    trajectory = run_one(engine, request_for(structure.prompt_ids), teacher)
    layout = layout_of(token_ids, length, structure.vocabulary)
    assert trajectory.finish is FinishReason.STOP
    assert trajectory.token_ids.tolist() == token_ids
    assert np.array_equal(trajectory.position_ids, layout.position_ids)
    assert np.array_equal(trajectory.block, layout.block)
    assert np.array_equal(trajectory.branch, layout.branch)
    assert np.array_equal(trajectory.forced, layout.forced)
    assert trajectory.weight_versions.tolist() == [-1] * length + [0] * (len(token_ids) - length)
    scored = engine.score([trajectory])[0]
    np.testing.assert_allclose(trajectory.logprobs, scored, atol=1e-5, rtol=0)
    is_predicted = layout.predecessor >= 0
    is_predicted[:length] = False
    assert (trajectory.logprobs[is_predicted] < 0.0).all()
    assert not trajectory.logprobs[~is_predicted].any()


def test_scoring_many_trajectories_together_changes_none() -> None:
    engine = tiny_engine()
    trajectories = [
        run_one(engine, request_for(PROMPT, max_new_tokens=size), TEACHER)
        for size in (3, 90, 30, 31)
    ]
    together = engine.score(trajectories)
    for trajectory, logprobs in zip(trajectories, together, strict=True):
        np.testing.assert_allclose(logprobs, engine.score([trajectory])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("limit", range(1, len(RESPONSE) + 2))
def test_the_total_budget_is_never_exceeded_and_ends_the_trajectory(limit: int) -> None:
    trajectory = run_one(tiny_engine(), request_for(PROMPT, max_new_tokens=limit), TEACHER)
    assert trajectory.num_tokens <= limit
    if limit >= len(RESPONSE):
        assert trajectory.finish is FinishReason.STOP
        return
    assert trajectory.finish is FinishReason.LENGTH
    # Only what does not fit as a whole may leave budget unspent: a fork with its smallest steps.
    longest_forced_run = 1 + 3 * (3 + 3)
    assert limit - trajectory.num_tokens <= longest_forced_run
    sources = predecessors(trajectory.block, trajectory.branch)
    is_predicted = (sources >= 0) & (np.arange(len(sources)) >= len(PROMPT))
    assert (trajectory.logprobs[is_predicted] < 0.0).all()


@pytest.mark.parametrize("limit", range(1, CRITICAL_PATH + 2))
def test_the_critical_path_budget_is_never_exceeded_and_ends_the_trajectory(limit: int) -> None:
    trajectory = run_one(tiny_engine(), request_for(PROMPT, max_critical_path=limit), TEACHER)
    assert trajectory.critical_path_tokens <= limit
    expected = FinishReason.STOP if limit >= CRITICAL_PATH else FinishReason.CRITICAL_PATH
    assert trajectory.finish is expected


def test_a_truncated_trajectory_is_a_prefix_of_every_stream() -> None:
    trajectory = run_one(tiny_engine(), request_for(PROMPT, max_new_tokens=40), TEACHER)
    whole = np.array([*PROMPT, *RESPONSE])
    labels = zip(trajectory.block, trajectory.branch, strict=True)
    for block, branch in set(labels):
        mine = (trajectory.block == block) & (trajectory.branch == branch)
        theirs = (LAYOUT.block == block) & (LAYOUT.branch == branch)
        assert trajectory.token_ids[mine].tolist() == whole[theirs][: mine.sum()].tolist()


@pytest.mark.parametrize(
    ("at", "token_id", "rule"),
    [
        ((0, 0, 0), 20, "text_outside_block"),
        ((0, 0, 3), 12, "wrong_index"),
        ((1, 2, 3), SMALL.step_close, "empty_text"),
        ((1, 3, 4), SMALL.guideline_open, "nested_guideline"),
        ((1, 1, 4), SMALL.eos, "open_block"),
    ],
)
def test_a_broken_rule_ends_the_trajectory_and_is_named(
    at: tuple[int, int, int], token_id: int, rule: str
) -> None:
    def teach(block: int, branch: int, index: int) -> int | None:
        return token_id if (block, branch, index) == at else TEACHER(block, branch, index)

    trajectory = run_one(tiny_engine(), request_for(PROMPT), teach)
    assert (trajectory.finish, trajectory.finish_detail) == (FinishReason.MALFORMED, rule)
    is_stream = (trajectory.block == at[0]) & (trajectory.branch == at[1])
    assert trajectory.token_ids[is_stream][-1] == token_id


def test_more_plans_than_the_engine_allows_are_malformed() -> None:
    engine = tiny_engine(max_plans=2)
    trajectory = run_one(engine, request_for(PROMPT), TEACHER)
    assert trajectory.finish_detail == "too_many_plans"


def test_sequential_decoding_is_plain_text_up_to_the_end_token() -> None:
    request = request_for(PROMPT, mode=DecodeMode.SEQUENTIAL)
    trajectory = run_one(tiny_engine(), request, lambda block, branch, index: RESPONSE[index])
    assert trajectory.finish is FinishReason.STOP
    assert trajectory.response_ids.tolist() == RESPONSE
    assert trajectory.position_ids.tolist() == list(range(len(PROMPT) + len(RESPONSE)))
    assert not trajectory.block.any()
    assert not trajectory.forced[len(PROMPT) :].any()


def test_equal_plans_in_sibling_branches_get_different_random_streams() -> None:
    blocks = (BlockTexts(((20,),) * 5, ((21, 22, 23, 24, 25, 26, 27, 28),) * 5, (30,)),)
    ids = [*PROMPT, *render(blocks, (20,), SPLIT)]
    engine = tiny_engine(
        model=UNTIED, weights=steered_weights(UNTIED, 1, WORDS, margin=30.0), vocabulary=SPLIT
    )
    trajectory = run_one(engine, request_for(PROMPT), skeleton_of(ids, len(PROMPT), SPLIT))
    texts = {
        tuple(trajectory.token_ids[trajectory.branch == branch][4:-2]) for branch in range(1, 6)
    }
    assert len(texts) == 5


@given(st.data())
@QUICK
def test_random_text_ends_with_a_reason_and_within_budget(data: st.DataObject) -> None:
    engine = tiny_engine()
    limit, path = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    request = request_for(
        PROMPT,
        seed=data.draw(st.integers(0, 2**64 - 1)),
        mode=data.draw(st.sampled_from(list(DecodeMode))),
        max_new_tokens=limit,
        max_critical_path=path,
    )
    trajectory = run_one(engine, request)
    assert 1 <= trajectory.num_tokens <= limit
    assert trajectory.critical_path_tokens <= path
    np.testing.assert_allclose(
        trajectory.logprobs, engine.score([trajectory])[0], atol=1e-5, rtol=0
    )
