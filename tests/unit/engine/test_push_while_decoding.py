"""A hundred pushes into an engine that never stops decoding: whose probabilities are these?"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pytest

from npr_megatron.engine.interface import Engine
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from tests.engines import (
    TINY,
    drain,
    random_weights,
    request_for,
    run_one,
    teacher_of_labels,
    tiny_engine,
)
from tests.unit.engine.test_decoding import PROMPT, TEACHER

NUM_PUSHES = 100
PROMPTS = (PROMPT, PROMPT[:3], (21, 22, 23))
Policy = Literal["drop", "recompute", "keep"]


@dataclass
class History:
    """What an engine did, step by step."""

    versions: list[int] = field(default_factory=list)
    """Live version of each step."""
    first_step: dict[str, int] = field(default_factory=dict)
    """At which step each request was admitted, by id."""
    finished: list[Trajectory] = field(default_factory=list)


def commit(engine: Engine, version: int) -> None:
    staged = engine.staging()
    for name, tensor in random_weights(TINY, version).items():
        staged[name].copy_(tensor)
    engine.commit(version)


def next_request(number: int, max_new_tokens: int) -> GenerationRequest:
    """Short texts only, or every second one a tree of 44 steps."""
    parallel = number % 2 == 0 and max_new_tokens > 20
    return request_for(
        PROMPT if parallel else PROMPTS[number // 2 % 3],
        rollout=number,
        seed=number,
        mode=DecodeMode.PARALLEL if parallel else DecodeMode.SEQUENTIAL,
        max_new_tokens=120 if parallel else max_new_tokens,
    )


def decode_while_pushing(policy: Policy, steps_per_push: int, max_new_tokens: int) -> History:
    """Keep six requests under way, rollouts of the same prompts at different times among them."""
    engine, history, number = tiny_engine(kv_after_push=policy), History(), 0
    for version in range(1, NUM_PUSHES + 1):
        for _ in range(steps_per_push):
            while engine.num_unfinished < 6:
                request = next_request(number, max_new_tokens)
                engine.add(request, TEACHER if request.mode is DecodeMode.PARALLEL else None)
                history.first_step[request.request_id] = len(history.versions)
                number += 1
            history.versions.append(engine.weight_version)
            history.finished += engine.step()
        assert engine.num_unfinished
        commit(engine, version)
    history.finished += drain(engine)
    assert engine.stats().num_kv_slots_held == 0
    return history


def assert_logprobs_of_versions(finished: list[Trajectory], shift: int = 0) -> None:
    """Every log-prob is that of its version plus ``shift``, given the text, by a masked pass."""
    users = defaultdict(list)
    for trajectory in finished:
        for version in set(trajectory.weight_versions.tolist()) - {-1}:
            users[version].append(trajectory)
    oracle = tiny_engine()
    for version in sorted(users):
        oracle.load(random_weights(TINY, version + shift), version)
        for trajectory, expected in zip(users[version], oracle.score(users[version]), strict=True):
            mine = trajectory.weight_versions == version
            np.testing.assert_allclose(trajectory.logprobs[mine], expected[mine], atol=1e-5, rtol=0)


def num_versions(trajectory: Trajectory) -> int:
    return len(set(trajectory.weight_versions.tolist()) - {-1})


def test_recompute_gives_each_token_the_log_prob_of_its_version_given_the_text() -> None:
    history = decode_while_pushing("recompute", steps_per_push=3, max_new_tokens=60)
    assert len(history.finished) > 20
    assert sum(num_versions(t) > 3 for t in history.finished) > 15
    assert_logprobs_of_versions(history.finished)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_logprobs_of_versions(history.finished, shift=-1)


def test_drop_gives_each_trajectory_one_version_and_its_log_probs() -> None:
    history = decode_while_pushing("drop", steps_per_push=9, max_new_tokens=8)
    assert len(history.finished) > NUM_PUSHES
    assert {num_versions(t) for t in history.finished} == {1}
    assert len({int(t.weight_versions[-1]) for t in history.finished}) > NUM_PUSHES * 0.9
    assert_logprobs_of_versions(history.finished)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_logprobs_of_versions(history.finished, shift=-1)


def replay(trajectory: Trajectory, versions: list[int]) -> Trajectory:
    """Decode one trajectory alone, its tokens dictated, under ``versions`` step by step."""
    engine = tiny_engine(kv_after_push="keep", weights=random_weights(TINY, versions[0]))
    prompt_length = trajectory.prompt_length
    request = request_for(
        trajectory.token_ids[:prompt_length].tolist(),
        mode=trajectory.mode,
        max_new_tokens=trajectory.num_tokens,
    )
    teacher = teacher_of_labels(
        trajectory.response_ids,
        trajectory.block[prompt_length:],
        trajectory.branch[prompt_length:],
    )
    engine.add(request, teacher)
    for version in versions:
        engine.load(random_weights(TINY, version), version)
        if finished := engine.step():
            return finished[0]
    return drain(engine)[0]


def test_keep_gives_each_token_the_log_prob_of_a_run_with_the_same_pushes() -> None:
    """Alone, it shares no prompt: keys and values of its prompt are of the step that began it."""
    history = decode_while_pushing("keep", steps_per_push=3, max_new_tokens=60)
    assert sum(num_versions(t) > 3 for t in history.finished) > 15
    late = [t for t in history.finished if t.weight_versions[t.prompt_length] > 5][:12]
    for trajectory in late:
        versions = history.versions[history.first_step[f"p#{trajectory.rollout}"] :]
        again = replay(trajectory, versions)
        np.testing.assert_array_equal(again.token_ids, trajectory.token_ids)
        np.testing.assert_array_equal(again.weight_versions, trajectory.weight_versions)
        np.testing.assert_allclose(again.logprobs, trajectory.logprobs, atol=1e-5, rtol=0)
        early = replay(trajectory, [version - 1 for version in versions])
        assert np.abs(early.logprobs - trajectory.logprobs).max() > 1e-3
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_logprobs_of_versions(late)  # of the text alone they are not: old keys are kept


@pytest.mark.parametrize("policy", ["drop", "recompute", "keep"])
def test_a_commit_while_others_wait_leaves_no_slot_behind(policy: Policy) -> None:
    engine = tiny_engine(kv_after_push=policy, max_running=2)
    for rollout in range(7):
        engine.add(request_for(PROMPT, rollout=rollout, max_new_tokens=120), TEACHER)
    engine.step()
    engine.abort("p#0")  # running
    engine.abort("p#6")  # waiting
    commit(engine, 1)
    engine.step()
    commit(engine, 2)
    finished = {t.rollout: t for t in drain(engine)}
    # The aborted ones end with the first step after the commit.
    assert sorted(finished) == [1, 2, 3, 4, 5]
    assert all(t.finish is FinishReason.STOP for t in finished.values())
    assert engine.stats().num_kv_slots_held == 0


def test_an_aborted_request_is_returned_after_a_commit_as_it_was() -> None:
    engine = tiny_engine(kv_after_push="drop")
    engine.add(request_for(PROMPT), TEACHER)
    for _ in range(4):
        engine.step()
    engine.abort("p#0")
    commit(engine, 1)
    (trajectory,) = engine.step()
    assert trajectory.finish is FinishReason.ABORTED
    assert trajectory.weight_versions[len(PROMPT) :].tolist() == [0] * 4


def test_dropped_trajectories_are_those_of_an_engine_that_had_the_new_weights_all_along() -> None:
    requests = [next_request(number, 40) for number in (1, 3, 5, 7)]
    engine = tiny_engine(kv_after_push="drop")
    for request in requests:
        engine.add(request)
    for _ in range(6):
        engine.step()
    commit(engine, 3)
    finished = {t.rollout: t for t in drain(engine)}
    for request in requests:
        fresh = tiny_engine(seed=3)
        expected = run_one(fresh, request)
        np.testing.assert_array_equal(finished[request.rollout].token_ids, expected.token_ids)
