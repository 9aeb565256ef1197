"""The engine against transformers: fork, join and positions are exact, not approximate.

Random structures of four to six chained blocks dictate the tags, the model chooses every word
greedily. Whatever the schedule, the words are those of the oracle (``tests.parity.hf_reference``)
and every log-prob, of sampled and of forced tokens, is the oracle's.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from npr_megatron.config.model import ModelConfig
from npr_megatron.records.trajectory import DecodeMode, Trajectory
from npr_megatron.schema.tags import Vocabulary
from tests.engines import (
    EXPERTS,
    LLAMA,
    TINY,
    UNTIED,
    assert_nothing_is_left,
    drain,
    drain_preempting,
    request_for,
    run_one,
    tiny_engine,
)
from tests.parity.corpora import (
    FAR,
    TOLERANCE,
    Reading,
    assert_as_the_oracle_says,
    gaps,
    lead,
    num_other_words,
    read,
    word_weights,
)
from tests.parity.hf_reference import (
    hf_model,
    oracle_logprobs,
    plain_form,
    sees_all,
    with_flat_positions,
    with_paper_positions,
)
from tests.structures import NUM_IDS, SMALL, SPLIT, Structure, random_structure

_FAR = {"max_position_embeddings": 2048}
LONG = UNTIED.model_copy(update=_FAR)
WIDE = LONG.model_copy(update={"num_attention_heads": 2, "head_dim": 16, "rope_theta": 1e6})
DEEP = LONG.model_copy(
    update={"num_attention_heads": 6, "num_key_value_heads": 1, "num_hidden_layers": 3}
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Structures, and what the oracle says of them once the model has filled in the words."""

    model: ModelConfig
    vocabulary: Vocabulary
    weights: dict[str, torch.Tensor]
    structures: list[Structure]
    trajectories: list[Trajectory]
    """Decoded together, in roomy memory."""
    reference: Qwen3ForCausalLM
    reading: Reading


def own_prompts(rng: random.Random) -> list[list[int]]:
    """Prompts that begin differently, tags among them."""
    return [rng.choices(range(NUM_IDS), k=rng.randint(1, 12)) for _ in range(80)]


def group_prompts(rng: random.Random) -> list[list[int]]:
    """Eight groups of six rollouts; half of them go on from the prompt of another group."""
    stems = [rng.choices(range(NUM_IDS), k=rng.randint(8, 40)) for _ in range(4)]
    stems += [stem + rng.choices(range(NUM_IDS), k=rng.randint(1, 20)) for stem in stems]
    return [stem for stem in stems for _ in range(6)]


def long_prompts(rng: random.Random) -> list[list[int]]:
    """Two groups behind one beginning long enough to be attended once for all who share it."""
    beginning = rng.choices(range(NUM_IDS), k=700)
    return [beginning + [last] * last for last in (21, 35) for _ in range(8)]


Prompts = Callable[[random.Random], list[list[int]]]
CORPORA: dict[str, tuple[ModelConfig, Vocabulary, Prompts, int]] = {
    "long": (LONG, SMALL, own_prompts, 6),
    "wide": (WIDE, SPLIT, own_prompts, 4),
    "deep": (DEEP, SMALL, own_prompts, 2),
    "groups": (LONG, SPLIT, group_prompts, 2),
    "long prompts": (WIDE, SMALL, long_prompts, 2),
    "experts": (EXPERTS.model_copy(update=_FAR), SMALL, group_prompts, 2),
    "llama": (LLAMA.model_copy(update=_FAR), SPLIT, group_prompts, 2),
}
"""Model, vocabulary, prompts, and the seed of weights under which no choice is near a tie."""


@functools.cache
def corpus(name: str) -> Corpus:
    """Draw, decode and price the structures of one name."""
    model, vocabulary, prompts, seed = CORPORA[name]
    rng = random.Random(name)
    structures = [
        random_structure(rng, prompt, vocabulary, num_blocks=(4, 6), max_tokens=6)
        for prompt in prompts(rng)
    ]
    weights = word_weights(model, seed)
    trajectories = decode(model, vocabulary, weights, structures)
    reference = hf_model(model, weights)
    return Corpus(
        model=model,
        vocabulary=vocabulary,
        weights=weights,
        structures=structures,
        trajectories=trajectories,
        reference=reference,
        reading=read(reference, structures, trajectories),
    )


def decode(
    model: ModelConfig,
    vocabulary: Vocabulary,
    weights: dict[str, torch.Tensor],
    structures: Sequence[Structure],
    preempted_every: int | None = None,
    **settings: Any,
) -> list[Trajectory]:
    """Return one greedy trajectory per structure."""
    engine = tiny_engine(
        model=model, vocabulary=vocabulary, weights=weights, **{"num_kv_slots": 65_536, **settings}
    )
    lead(engine, structures)
    if preempted_every is None:
        finished = drain(engine)
    else:
        request_ids = [f"p#{number}" for number in range(len(structures))]
        finished = drain_preempting(engine, request_ids, preempted_every)
        assert engine.stats().num_preemptions > len(structures)
    assert_nothing_is_left(engine)
    return sorted(finished, key=lambda trajectory: trajectory.rollout)


@pytest.mark.parametrize("name", CORPORA)
def test_greedy_tokens_and_logprobs_of_branch_parallel_decoding_equal_transformers(name) -> None:
    known = corpus(name)
    assert assert_as_the_oracle_says(known.reading, known.trajectories) > 60 * len(known.structures)
    assert min(trajectory.num_blocks for trajectory in known.trajectories) >= 4
    assert {len(b.steps) for s in known.structures for b in s.blocks} == {1, 2, 3, 4, 5}


SMALLEST_STREAMS = {"max_plans": 5, "max_streams": 5}
SCHEDULES: dict[str, dict[str, Any]] = {
    "few running": {"max_running": 3},
    "waves": SMALLEST_STREAMS,
    "chunked prefill": {"max_step_tokens": 16, "max_streams": 8},
    "small pool": {"num_kv_slots": 1500},
    "preempted": {"preempted_every": 5},
    "preempted in waves": {"preempted_every": 9, "num_kv_slots": 1500, **SMALLEST_STREAMS},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["groups", "long prompts"])
def test_no_schedule_changes_what_the_oracle_says(name: str, schedule: str) -> None:
    known = corpus(name)
    trajectories = decode(
        known.model, known.vocabulary, known.weights, known.structures, **SCHEDULES[schedule]
    )
    assert_as_the_oracle_says(known.reading, trajectories)


WRONG: dict[str, Callable[[Corpus], list[torch.Tensor]]] = {
    "siblings visible": lambda known: oracle_logprobs(
        known.reference, known.reading.forms, sees_all
    ),
    "positions flattened": lambda known: oracle_logprobs(
        known.reference, [with_flat_positions(form) for form in known.reading.forms]
    ),
    "positions shifted by one": lambda known: oracle_logprobs(
        known.reference,
        [
            with_paper_positions(form, structure)
            for form, structure in zip(known.reading.forms, known.structures, strict=True)
        ],
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_oracle_disagrees_on_every_structure(wrong: str) -> None:
    known = corpus("deep")
    logprobs = WRONG[wrong](known)
    assert min(gaps(known.trajectories, logprobs, known.reading.forms)) > FAR
    assert num_other_words(logprobs, known.reading.forms) > len(known.structures)


@pytest.mark.parametrize(
    "model", [TINY, UNTIED, EXPERTS, LLAMA], ids=["tied", "untied", "experts", "llama"]
)
def test_sequential_decoding_equals_transformers(model: ModelConfig) -> None:
    engine = tiny_engine(model=model, seed=5)
    request = request_for(
        range(2, 9), mode=DecodeMode.SEQUENTIAL, temperature=0.0, max_new_tokens=48
    )
    trajectory = run_one(engine, request)
    form = plain_form(trajectory.token_ids, trajectory.prompt_length)
    logprobs = oracle_logprobs(hf_model(model, engine.weights), [form])
    expected = logprobs[0][form.predecessor[form.predicted]].argmax(-1)
    np.testing.assert_array_equal(trajectory.response_ids, expected)
    assert max(gaps([trajectory], logprobs, [form])) <= TOLERANCE
