"""Trajectories that are led along random structures, and what the oracle says of them.

Structures dictate the tags, the model chooses every word greedily. The words are then those of the
oracle (``tests.parity.hf_reference``) and every log-prob, of sampled and of forced tokens, is the
oracle's; whatever computed them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Qwen3ForCausalLM

from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.interface import Engine
from npr_megatron.records.trajectory import FinishReason, Trajectory
from tests.engines import request_for, skeleton_of, steered_weights
from tests.parity.hf_reference import LinearForm, linear_form, oracle_logprobs
from tests.structures import WORDS, Structure

TOLERANCE = 1e-5
FAR = 1000 * TOLERANCE
"""What a wrong oracle exceeds on every structure."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """Structures with the words that a model filled in, as the oracle reads them."""

    forms: list[LinearForm]
    logprobs: list[torch.Tensor]
    """[T, V] of the oracle after each token."""


def word_weights(model: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Weights that choose words, with moderate logits: fp32 rounds them less."""
    weights = steered_weights(model, seed, WORDS)
    weights["lm_head.weight"][:, 1:] *= 0.5
    return weights


def lead(engine: Engine, structures: Sequence[Structure]) -> None:
    """Add one greedy request per structure, under budgets that it spends to the last."""
    for number, structure in enumerate(structures):
        form = linear_form(structure)
        request = request_for(
            structure.prompt_ids,
            rollout=number,
            temperature=0.0,
            max_new_tokens=len(structure.response_ids),
            max_critical_path=int(form.position_ids.max()) + 1 - structure.prompt_length,
        )
        token_ids, vocabulary = structure.token_ids, structure.vocabulary
        engine.add(request, skeleton_of(token_ids, structure.prompt_length, vocabulary))


def read(
    reference: Qwen3ForCausalLM,
    structures: Sequence[Structure],
    trajectories: Sequence[Trajectory],
) -> Reading:
    """Ask the oracle about ``structures`` with the words of ``trajectories``."""
    forms = [
        dataclasses.replace(linear_form(structure), token_ids=trajectory.token_ids)
        for structure, trajectory in zip(structures, trajectories, strict=True)
    ]
    return Reading(forms=forms, logprobs=oracle_logprobs(reference, forms))


def gaps(trajectories: Sequence[Trajectory], logprobs, forms: Sequence[LinearForm]) -> list[float]:
    """Largest |engine - oracle| of each trajectory over the tokens that something predicts."""
    found = []
    for trajectory, scores, form in zip(trajectories, logprobs, forms, strict=True):
        targets = form.predicted
        expected = scores[form.predecessor[targets], trajectory.token_ids[targets]].numpy()
        found.append(float(np.abs(trajectory.logprobs[targets] - expected).max()))
    return found


def assert_as_the_oracle_says(reading: Reading, trajectories: Sequence[Trajectory]) -> int:
    """Compare everything recorded; return the number of words chosen greedily."""
    num_words = 0
    triples = zip(trajectories, reading.forms, reading.logprobs, strict=True)
    for trajectory, form, scores in triples:
        assert trajectory.finish is FinishReason.STOP
        for name in ("token_ids", "position_ids", "block", "branch"):
            np.testing.assert_array_equal(getattr(trajectory, name), getattr(form, name), name)
        np.testing.assert_array_equal(trajectory.forced, form.is_forced)
        assert not trajectory.logprobs[form.predecessor < 0].any()
        best, words = scores[form.predecessor[form.is_word]].topk(2)
        assert (best[:, 0] - best[:, 1]).min() > 2 * TOLERANCE, "a tie that rounding could decide"
        np.testing.assert_array_equal(trajectory.token_ids[form.is_word], words[:, 0])
        num_words += int(form.is_word.sum())
    assert max(gaps(trajectories, reading.logprobs, reading.forms)) <= TOLERANCE
    return num_words


def num_other_words(logprobs: Sequence[torch.Tensor], forms: Sequence[LinearForm]) -> int:
    """Count the words that a greedy choice by ``logprobs`` would not take."""
    num_other = 0
    for form, scores in zip(forms, logprobs, strict=True):
        words = np.flatnonzero(form.is_word)
        chosen = scores[form.predecessor[words]].argmax(-1).numpy()
        num_other += int((chosen != form.token_ids[words]).sum())
    return num_other
