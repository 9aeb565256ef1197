"""Filters and penalties against Transformers' own, each alone and all in its order.

A draw is held against the distribution that Transformers' processors leave, at numbers that are
not too close to the border between two tokens: there the rounding of two libraries decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from npr_megatron.engine.compute.sampler import SamplingRows, choose, draw
from npr_megatron.engine.flow.flow import Flow
from npr_megatron.records.randomness import uniforms
from npr_megatron.records.trajectory import DecodeMode
from npr_megatron.schema.grammar import Grammar
from tests.engines import UNTIED, random_weights, request_for, run_one, tiny_engine
from tests.parity.hf_reference import hf_model
from tests.structures import QUICK, SMALL

BORDER = 1e-4
"""Probability around a filter's or a token's border that is left out."""
NUM_DRAWS = 200

Shape = tuple[float, int, float, float]
"""Temperature, top-k, top-p, min-p."""


def processors(shape: Shape) -> list[LogitsProcessor]:
    """Return Transformers' for ``shape``, in the order of its ``generate``."""
    temperature, top_k, top_p, min_p = shape
    found: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
    if top_k:
        found.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        found.append(TopPLogitsWarper(top_p))
    if min_p:
        found.append(MinPLogitsWarper(min_p))
    return found


def left_by(chain: Sequence[LogitsProcessor], logits: torch.Tensor) -> npt.NDArray[np.float64]:
    """Return the [V] probabilities behind ``chain``."""
    scores = LogitsProcessorList(chain)(torch.zeros(1, 1, dtype=torch.int64), logits[None])[0]
    return torch.softmax(scores.double(), dim=-1).numpy()


def is_clear(logits: torch.Tensor, shape: Shape) -> bool:
    """Whether no filter's border lies so close to a token that rounding decides over it."""
    temperature, top_k, top_p, min_p = shape
    probs = torch.softmax(logits.double() / temperature, dim=-1).sort(descending=True).values
    probs = probs[: top_k or None] / probs[: top_k or None].sum()
    is_clear_p = ((probs.cumsum(-1) - top_p).abs() > BORDER).all() or top_p == 1.0
    return bool(is_clear_p and ((probs / probs[0] - min_p).abs() > BORDER).all())


def disagreements(logits: torch.Tensor, shape: Shape, probs: npt.NDArray[np.float64]) -> int:
    """Count draws that are not those of ``probs``."""
    ends = probs.cumsum()
    points = (np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS
    points = points[(np.abs(points[:, None] - ends) > BORDER).all(axis=1)]
    rows = SamplingRows(np.tile(np.array(shape, np.float64), (len(points), 1)), points)
    found = draw(logits.expand(len(points), -1), rows).numpy()
    return int((found != np.searchsorted(ends, points, side="right")).sum())


shapes = st.tuples(
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([0, 1, 4, 30]),
    st.sampled_from([0.2, 0.7, 0.95, 1.0]),
    st.sampled_from([0.0, 0.03, 0.4]),
)


def random_logits(seed: int, num_tokens: int = 60) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, num_tokens).astype(np.float32))


@QUICK
@given(st.integers(0, 10_000), shapes)
def test_draws_are_those_of_transformers_processors(seed: int, shape: Shape) -> None:
    logits = random_logits(seed)
    if is_clear(logits, shape):
        assert disagreements(logits, shape, left_by(processors(shape), logits)) == 0


def test_all_equal_scores_at_the_border_of_top_k_stay_as_in_transformers() -> None:
    logits = torch.tensor([1.0, 3.0, 1.0, 0.0, 1.0])
    shape = (1.0, 2, 1.0, 0.0)
    probs = left_by(processors(shape), logits)
    assert (probs > 0).tolist() == [True, True, True, False, True]
    assert disagreements(logits, shape, probs) == 0


def test_another_order_of_filters_would_be_noticed() -> None:
    """Control: nucleus before top-k, or temperature last, leaves other distributions."""
    shape = (1.7, 4, 0.7, 0.03)
    seeds = [seed for seed in range(60) if is_clear(random_logits(seed), shape)]
    assert len(seeds) > 30
    temperature, top_k, top_p, min_p = processors(shape)
    for wrong in ([temperature, top_p, top_k, min_p], [top_k, top_p, min_p, temperature]):
        logits = map(random_logits, seeds)
        assert any(disagreements(row, shape, left_by(wrong, row)) for row in logits)


@QUICK
@given(st.integers(0, 10_000), st.sampled_from([0.7, 1.02, 1.3, 2.0]))
def test_penalties_act_on_logits_as_transformers_processor_does(seed: int, penalty: float) -> None:
    rng = np.random.default_rng(seed)
    prompt_ids = tuple(rng.integers(0, 60, rng.integers(1, 30)).tolist())
    request = dataclasses.replace(
        request_for(prompt_ids, mode=DecodeMode.SEQUENTIAL, seed=seed), repetition_penalty=penalty
    )
    stream = Flow(request, Grammar(SMALL), SMALL.eos).trunk
    for _ in range(20):
        logits = torch.from_numpy(rng.normal(0, 3, (1, 60)).astype(np.float32))
        sequence = torch.tensor([stream.segment.token_ids])
        scores = RepetitionPenaltyLogitsProcessor(penalty)(sequence, logits.clone())
        ends = torch.softmax(scores[0].double(), dim=-1).numpy().cumsum()
        point = uniforms(np.array([stream.key], np.uint64), np.array([stream.index], np.uint64))
        (token,), _ = choose(logits, [stream])
        if (np.abs(ends - point) > BORDER).all():
            assert token == int(np.searchsorted(ends, point[0], side="right"))
        stream.place(token, forced=False, logprob=0.0, version=0)


def test_a_greedy_choice_is_penalised_too() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.9, 0.0]])
    expected = RepetitionPenaltyLogitsProcessor(1.2)(torch.tensor([[1]]), logits.clone()).argmax()
    request = request_for((1,), mode=DecodeMode.SEQUENTIAL, temperature=0.0)
    for penalty, token in ((1.2, int(expected)), (1.0, 1)):
        asked = dataclasses.replace(request, repetition_penalty=penalty)
        assert choose(logits, [Flow(asked, Grammar(SMALL), SMALL.eos).trunk])[0] == [token]
    assert int(expected) == 2


@pytest.mark.parametrize("penalty", [1.0, 1.1, 1.6])
def test_an_engine_writes_what_transformers_generates_and_records_the_plain_policy(
    penalty: float,
) -> None:
    weights = random_weights(UNTIED, 4)
    reference = hf_model(UNTIED, weights)
    request = request_for(
        (20, 31, 22),
        mode=DecodeMode.SEQUENTIAL,
        max_new_tokens=40,
        temperature=0.0,
        repetition_penalty=penalty,
    )
    trajectory = run_one(tiny_engine(model=UNTIED, weights=weights), request)
    expected = reference.generate(
        torch.tensor([request.prompt_ids]),
        max_new_tokens=40,
        do_sample=False,
        repetition_penalty=penalty,
        eos_token_id=SMALL.eos,
        pad_token_id=SMALL.eos,
    )
    assert trajectory.token_ids.tolist() == expected[0].tolist()
    with torch.inference_mode():
        logprobs = torch.log_softmax(reference(expected).logits[0].double(), dim=-1)
    plain = logprobs[:-1].gather(-1, expected[0, 1:, None])[2:, 0].numpy()
    np.testing.assert_allclose(trajectory.logprobs[3:], plain, atol=1e-5, rtol=0)
    repeats = len(expected[0]) - len(set(expected[0].tolist()))
    assert (repeats > 5) is (penalty < 1.6), "the penalty decides what is written"


@pytest.mark.parametrize("penalty", [1.02, 1.3, 5.0])
def test_on_log_probs_a_penalty_would_not_break_a_loop(penalty: float) -> None:
    """Control: why the sampler needs logits. A token of probability 0.999 keeps it on log-probs."""
    logits = torch.tensor([[20.0, 11.0, 11.0]])
    processor, seen = RepetitionPenaltyLogitsProcessor(penalty), torch.tensor([[0]])
    on_logits = torch.softmax(processor(seen, logits.clone()), dim=-1)[0, 0]
    on_logprobs = torch.softmax(processor(seen, torch.log_softmax(logits, -1)), dim=-1)[0, 0]
    assert on_logprobs > 0.998
    assert on_logits < torch.softmax(logits, dim=-1)[0, 0] - 1e-5
