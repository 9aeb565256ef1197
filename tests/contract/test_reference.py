"""Every backend against transformers, with an explicit mask and explicit positions.

The controls recompute what was decoded in the two ways that NPR must not compute it: with positions
that are places in a row, and as plain text in which the branches of a block see each other.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable

import numpy as np
import pytest
from transformers import Qwen3ForCausalLM

from npr_megatron.engine.interface import Engine
from npr_megatron.errors import InputError
from npr_megatron.records.trajectory import DecodeMode, IntArray, Trajectory
from npr_megatron.schema.tags import Vocabulary
from tests.contract.backends import MODEL, Backend
from tests.engines import assert_nothing_is_left, drain, random_weights, request_for, run_one
from tests.parity.corpora import (
    FAR,
    TOLERANCE,
    assert_as_the_oracle_says,
    gaps,
    lead,
    num_other_words,
    read,
    word_weights,
)
from tests.parity.hf_reference import (
    LinearForm,
    hf_model,
    oracle_logprobs,
    plain_form,
    sees_all,
    sees_tree,
)
from tests.structures import NUM_IDS, Structure, random_structure

NUM_STRUCTURES = 16
WEIGHTS_SEED = 7
"""Under which no choice is near a tie."""


@functools.cache
def structures(vocabulary: Vocabulary) -> list[Structure]:
    """Three or four blocks of one to five branches behind prompts that half of them share."""
    rng = random.Random(5)
    stem = rng.choices(range(NUM_IDS), k=30)
    return [
        random_structure(
            rng,
            stem[: rng.choice([30, 30, 4])] + rng.choices(range(NUM_IDS), k=number % 3),
            vocabulary,
            num_blocks=(3, 4),
            max_tokens=6,
        )
        for number in range(NUM_STRUCTURES)
    ]


@functools.cache
def reference() -> Qwen3ForCausalLM:
    return hf_model(MODEL, word_weights(MODEL, WEIGHTS_SEED))


def decode_structures(engine: Engine, backend: Backend) -> list[Trajectory]:
    backend.load(engine, word_weights(MODEL, WEIGHTS_SEED))
    lead(engine, structures(backend.vocabulary))
    return sorted(drain(engine), key=lambda trajectory: trajectory.rollout)


def test_greedy_tokens_and_logprobs_equal_transformers(engine: Engine, backend: Backend) -> None:
    led = structures(backend.vocabulary)
    trajectories = decode_structures(engine, backend)
    reading = read(reference(), led, trajectories)
    assert assert_as_the_oracle_says(reading, trajectories) > 40 * NUM_STRUCTURES
    assert min(trajectory.num_blocks for trajectory in trajectories) >= 3
    assert {len(block.steps) for s in led for block in s.blocks} == {1, 2, 3, 4, 5}
    assert any(len(set(map(len, block.steps))) > 2 for s in led for block in s.blocks)


def test_a_preemption_changes_nothing_that_transformers_says(
    engine: Engine, backend: Backend
) -> None:
    backend.load(engine, word_weights(MODEL, WEIGHTS_SEED))
    before = engine.stats().num_preemptions
    lead(engine, structures(backend.vocabulary))
    rng, trajectories = random.Random(1), list[Trajectory]()
    while engine.num_unfinished:
        trajectories += engine.step()
        if engine.num_unfinished and rng.random() < 0.2:
            engine.preempt(rng.choice(sorted(engine.unfinished)))
    trajectories.sort(key=lambda trajectory: trajectory.rollout)
    assert_as_the_oracle_says(
        read(reference(), structures(backend.vocabulary), trajectories), trajectories
    )
    assert engine.stats().num_preemptions > before


def test_sequential_text_equals_transformers(engine: Engine, backend: Backend) -> None:
    weights = random_weights(MODEL, 5)
    backend.load(engine, weights)
    request = request_for(
        range(2, 9), mode=DecodeMode.SEQUENTIAL, temperature=0.0, max_new_tokens=48
    )
    trajectory = run_one(engine, request)
    form = plain_form(trajectory.token_ids, trajectory.prompt_length)
    logprobs = oracle_logprobs(hf_model(MODEL, weights), [form])
    expected = logprobs[0][form.predecessor[form.predicted]].argmax(-1)
    np.testing.assert_array_equal(trajectory.response_ids, expected)
    assert max(gaps([trajectory], logprobs, [form])) <= TOLERANCE


def test_a_recorded_trajectory_is_scored_as_transformers_does_under_other_weights(
    engine: Engine, backend: Backend
) -> None:
    trajectories = decode_structures(engine, backend)
    np.testing.assert_allclose(
        np.concatenate(engine.score(trajectories)),
        np.concatenate([trajectory.logprobs for trajectory in trajectories]),
        atol=TOLERANCE,
        rtol=0,
    )
    weights = word_weights(MODEL, WEIGHTS_SEED + 1)
    backend.load(engine, weights)
    scored = [
        dataclasses.replace(trajectory, logprobs=logprobs)
        for trajectory, logprobs in zip(trajectories, engine.score(trajectories), strict=True)
    ]
    reading = read(hf_model(MODEL, weights), structures(backend.vocabulary), trajectories)
    assert max(gaps(scored, reading.logprobs, reading.forms)) <= TOLERANCE
    assert min(gaps(trajectories, reading.logprobs, reading.forms)) > FAR
    assert_nothing_is_left(engine)


# Controls: what NPR must not compute


def places_in_rows(form: LinearForm) -> IntArray:
    """Positions without offset: the trunk and one branch, or trunk, branches, trunk, in a row."""
    positions = np.arange(len(form.token_ids), dtype=np.int32)
    for block in range(1, int(form.block.max()) + 1):
        (members,) = np.nonzero(form.block == block)
        for branch in range(2, int(form.branch[members].max()) + 1):
            own = members[form.branch[members] == branch]
            positions[own] = members[0] + np.arange(len(own))
    return positions


def without_offset(trajectory: Trajectory, form: LinearForm) -> Trajectory:
    """The same tree at positions that are places in a row."""
    return dataclasses.replace(trajectory, position_ids=places_in_rows(form))


def joined_as_text(trajectory: Trajectory, form: LinearForm) -> Trajectory:
    """The linear form as a plain text."""
    zeros = np.zeros_like(trajectory.block)
    return dataclasses.replace(
        trajectory,
        mode=DecodeMode.SEQUENTIAL,
        position_ids=np.arange(len(zeros), dtype=np.int32),
        block=zeros,
        branch=zeros,
    )


WRONG: dict[str, tuple[Callable[[Trajectory, LinearForm], Trajectory], Callable]] = {
    "positions without offset": (without_offset, sees_tree),
    "joined as text": (joined_as_text, sees_all),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_way_to_compute_the_same_tokens_fails_the_comparison(
    engine: Engine, backend: Backend, wrong: str
) -> None:
    """The backend computes the wrong thing exactly, so the comparison would have noticed."""
    distort, sees = WRONG[wrong]
    trajectories = decode_structures(engine, backend)
    reading = read(reference(), structures(backend.vocabulary), trajectories)
    distorted = [distort(*pair) for pair in zip(trajectories, reading.forms, strict=True)]
    if wrong == "positions without offset" and backend.config.backend == "sglang":
        with pytest.raises(InputError, match="scores the canonical layout only"):
            engine.score(distorted)
        return  # tests/sglang/test_plugin.py computes stages without their offsets
    computed = [
        dataclasses.replace(trajectory, logprobs=logprobs)
        for trajectory, logprobs in zip(distorted, engine.score(distorted), strict=True)
    ]
    assert min(gaps(computed, reading.logprobs, reading.forms)) > FAR
    forms = [
        dataclasses.replace(form, position_ids=trajectory.position_ids)
        for form, trajectory in zip(reading.forms, distorted, strict=True)
    ]
    logprobs = oracle_logprobs(reference(), forms, sees)
    assert max(gaps(computed, logprobs, forms)) <= TOLERANCE
    assert num_other_words(logprobs, forms) > NUM_STRUCTURES
