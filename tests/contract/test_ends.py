"""Why trajectories end, and with which token: the same on every backend."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from npr_megatron.engine.events import TokenEvent
from npr_megatron.engine.flow.flow import Teacher
from npr_megatron.engine.interface import Engine
from npr_megatron.errors import InputError
from npr_megatron.records.request import GenerationRequest, RefusalPolicy
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from npr_megatron.schema.rules import Rule
from npr_megatron.topology.layout import layout_of
from tests.contract.backends import MODEL, ROUNDING, Asked, Backend, decode
from tests.engines import (
    assert_same_trajectory,
    drain,
    random_weights,
    request_for,
    run_one,
    step_until,
    teacher_of,
)
from tests.structures import NUM_IDS, Structure
from tests.trees import assert_is_a_tree
from tests.unit.engine.test_decoding import BLOCKS, PROMPT


def structure_for(backend: Backend) -> Structure:
    """Two blocks of unequal branches."""
    return Structure(
        vocabulary=backend.vocabulary, prompt_ids=PROMPT, blocks=BLOCKS, conclusion=(20, 25)
    )


def teacher_for(structure: Structure) -> Teacher:
    return teacher_of(structure.token_ids, structure.prompt_length, structure.vocabulary)


def check(engine: Engine, backend: Backend, asked: list[Asked]) -> list[Trajectory]:
    """Decode ``asked`` together; it must come to what it comes to alone."""
    weights = random_weights(MODEL, 0)
    backend.load(engine, weights)
    found = decode(engine, asked)
    for trajectory, expected in zip(found, backend.expected(asked, weights), strict=True):
        assert_same_trajectory(trajectory, expected, tolerance=ROUNDING)
        assert_is_a_tree(trajectory, backend.vocabulary)
    return found


def assert_cut_from(trajectory: Trajectory, whole: Trajectory) -> None:
    """Every stream of ``trajectory`` is the beginning of that of ``whole``."""
    for block, branch in {*zip(trajectory.block.tolist(), trajectory.branch.tolist(), strict=True)}:
        mine, all_of_it = (
            t.token_ids[(t.block == block) & (t.branch == branch)].tolist()
            for t in (trajectory, whole)
        )
        assert mine == all_of_it[: len(mine)]


@pytest.mark.parametrize(
    ("budget", "policy", "every"),
    [
        ("max_new_tokens", RefusalPolicy.TERMINATE, 1),
        ("max_critical_path", RefusalPolicy.TERMINATE, 3),
        ("max_new_tokens", RefusalPolicy.SEQUENTIAL, 5),
        ("max_critical_path", RefusalPolicy.SEQUENTIAL, 7),
    ],
)
def test_every_budget_ends_at_its_exact_token(
    engine: Engine, backend: Backend, budget: str, policy: RefusalPolicy, every: int
) -> None:
    structure = structure_for(backend)
    limits = range(1, len(structure.response_ids) + every, every)
    asked = [
        (
            request_for(
                structure.prompt_ids, rollout=limit, seed=1, on_refusal=policy, **{budget: limit}
            ),
            teacher_for(structure),
        )
        for limit in limits
    ]
    found = check(engine, backend, asked)
    for limit, trajectory in zip(limits, found, strict=True):
        assert trajectory.num_tokens <= (limit if budget == "max_new_tokens" else 400)
        assert trajectory.critical_path_tokens <= limit
    reason = FinishReason.LENGTH if budget == "max_new_tokens" else FinishReason.CRITICAL_PATH
    if policy is RefusalPolicy.TERMINATE:
        assert {t.finish for t in found} == {reason, FinishReason.STOP}
        for trajectory in found:
            assert_cut_from(trajectory, found[-1])
    else:
        assert any("no room to fork" in t.finish_detail for t in found)


def test_a_whole_response_stops_and_leaves_nothing_to_explain(
    engine: Engine, backend: Backend
) -> None:
    structure = structure_for(backend)
    asked = [(request_for(structure.prompt_ids), teacher_for(structure))]
    (found,) = check(engine, backend, asked)
    layout = layout_of(structure.token_ids, structure.prompt_length, backend.vocabulary)
    assert (found.finish, found.finish_detail) == (FinishReason.STOP, "")
    assert found.token_ids.tolist() == structure.token_ids
    assert found.position_ids.tolist() == layout.position_ids.tolist()


def spoilt(structure: Structure, at: int, token_id: int) -> Teacher:
    """The teacher of ``structure`` that writes ``token_id`` instead of one sampled token."""
    length = structure.prompt_length
    layout = layout_of(structure.token_ids, length, structure.vocabulary)
    index = length + int(np.flatnonzero(~layout.forced[length:])[at])
    label = (layout.block[index], layout.branch[index])
    same = (layout.block[length:index] == label[0]) & (layout.branch[length:index] == label[1])
    place = (*map(int, label), int(same.sum()))
    teach = teacher_for(structure)
    return lambda *asked: token_id if asked == place else teach(*asked)


def test_a_broken_rule_ends_the_trajectory_or_its_parallel_part(
    engine: Engine, backend: Backend
) -> None:
    structure, rng = structure_for(backend), random.Random(4)
    num_sampled = len(structure.response_ids) * 2 // 3
    asked: list[Asked] = [
        (
            request_for(
                structure.prompt_ids,
                rollout=number,
                seed=number,
                on_refusal=list(RefusalPolicy)[number % 2],
                max_new_tokens=120,
            ),
            spoilt(structure, rng.randrange(num_sampled), rng.randrange(1, NUM_IDS)),
        )
        for number in range(40)
    ]
    found = check(engine, backend, asked)
    malformed = [t for t in found if t.finish is FinishReason.MALFORMED]
    assert {t.rollout % 2 for t in malformed} == {0}
    rules = {Rule(t.finish_detail) for t in malformed}
    assert len(rules) >= 4, rules
    assert any(t.branch[-1] for t in malformed), "a rule broken inside a branch"
    served = [t.finish_detail for t in found if t.rollout % 2 and t.finish_detail]
    assert {detail.split()[0] for detail in served} == {"sequential", "closed"}


def test_more_plans_than_the_engine_allows_are_malformed(engine: Engine, backend: Backend) -> None:
    v = backend.vocabulary
    plans = [x for index in (*v.index_ids, v.index_ids[0]) for x in (4, *index, 20, 5, 10)]
    response = [v.guideline_open, v.newline, *plans, v.guideline_close]
    request = request_for((20, 21))

    def teach(block: int, branch: int, index: int) -> int | None:
        return response[index] if index < len(response) else None

    (found,) = check(engine, backend, [(request, teach)])
    assert found.finish is FinishReason.MALFORMED
    assert found.finish_detail in {Rule.TOO_MANY_PLANS, Rule.WRONG_INDEX}


def long_text(block: int, branch: int, index: int) -> int:
    """Teach words without end."""
    return 20 + index * 7 % 20


def long_request(**options: Any) -> GenerationRequest:
    """A text that goes on for longer than any test waits."""
    settings = {"mode": DecodeMode.SEQUENTIAL, "max_new_tokens": 1900, "max_critical_path": 1900}
    return request_for((20, 21, 22), **{**settings, **options})


def assert_written_so_far(engine: Engine, trajectory: Trajectory) -> None:
    """What was written by then is the beginning of the text, with the model's log-probs."""
    assert trajectory.response_ids.tolist() == [
        long_text(0, 0, i) for i in range(trajectory.num_tokens)
    ]
    (scored,) = engine.score([trajectory])
    np.testing.assert_allclose(trajectory.logprobs, scored, atol=ROUNDING, rtol=0)


def test_time_that_is_up_ends_a_request_with_what_was_written(
    engine: Engine, backend: Backend
) -> None:
    backend.load(engine, random_weights(MODEL, 0))
    for timeout_s in (0.4, 2.0, 10.0):  # until the first token, on a machine that is busy
        late = run_one(engine, long_request(timeout_s=timeout_s), long_text)
        assert late.finish is FinishReason.TIMEOUT
        if late.num_tokens:
            break
    assert 0 < late.num_tokens < 1900
    assert_written_so_far(engine, late)
    at_once = run_one(engine, long_request(timeout_s=1e-6), long_text)
    assert at_once.finish is FinishReason.TIMEOUT
    assert at_once.num_tokens <= 1
    in_time = run_one(engine, long_request(timeout_s=100.0, max_new_tokens=5), long_text)
    assert in_time.finish is FinishReason.LENGTH


def test_an_aborted_request_returns_what_it_wrote_and_the_others_go_on(
    engine: Engine, backend: Backend
) -> None:
    backend.load(engine, random_weights(MODEL, 0))
    told: list[TokenEvent] = []
    engine.add(long_request(rollout=0), long_text, told.append)
    engine.add(long_request(rollout=1, max_new_tokens=60), long_text)
    engine.add(long_request(rollout=2), long_text)
    finished = step_until(engine, lambda: len(told) >= 5)
    engine.abort("p#0")
    engine.abort("p#2")
    finished += drain(engine)
    first, second, third = sorted(finished, key=lambda trajectory: trajectory.rollout)
    assert first.finish is third.finish is FinishReason.ABORTED
    assert 5 <= first.num_tokens < 1900
    assert second.finish is FinishReason.LENGTH
    assert second.num_tokens == 60
    for trajectory in (first, second, third):
        assert_written_so_far(engine, trajectory)


@pytest.mark.parametrize("num_told", [0, 9, 25, 33, 44])
def test_a_tree_is_aborted_wherever_it_stands(
    engine: Engine, backend: Backend, num_told: int
) -> None:
    backend.load(engine, random_weights(MODEL, 0))
    structure = structure_for(backend)
    told: list[object] = []
    engine.add(request_for(structure.prompt_ids), teacher_for(structure), told.append)
    finished = step_until(engine, lambda: len(told) >= num_told)
    if engine.num_unfinished:
        engine.abort("p#0")
    (trajectory,) = finished + drain(engine)
    assert_is_a_tree(trajectory, backend.vocabulary)
    (scored,) = engine.score([trajectory])
    np.testing.assert_allclose(trajectory.logprobs, scored, atol=ROUNDING, rtol=0)


def test_nobody_aborts_or_preempts_what_is_not_there(engine: Engine) -> None:
    for act, what in ((engine.abort, "aborted"), (engine.preempt, "preempted")):
        with pytest.raises(InputError, match=f"request p#77 was to be {what}"):
            act("p#77")


def test_weights_that_give_no_distribution_fail_the_request_and_not_the_engine(
    engine: Engine, backend: Backend
) -> None:
    weights = random_weights(MODEL, 0)
    weights["layers.1.down_proj.weight"][:] = 1e38
    backend.load(engine, weights, version=9)
    structure = structure_for(backend)
    lost = run_one(engine, request_for(structure.prompt_ids), teacher_for(structure))
    assert lost.finish is FinishReason.FAILED
    assert "weight version 9" in lost.finish_detail
    assert np.isfinite(lost.logprobs).all()
    check(engine, backend, [(request_for(structure.prompt_ids), teacher_for(structure))])
