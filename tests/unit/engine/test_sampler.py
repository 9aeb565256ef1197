"""Sampling: exact inverse CDF, exact nucleus, greedy where the temperature is zero."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.engine.sampler import SamplingRows, draw, policy_logprobs
from tests.structures import QUICK


def rows(temperature: list[float], top_p: list[float], uniforms: list[float]) -> SamplingRows:
    return SamplingRows(np.array(temperature), np.array(top_p), np.array(uniforms))


def slow_draw(logits: list[float], temperature: float, top_p: float, uniform: float) -> int:
    """One row by plain Python: temperature, nucleus, inverse CDF in id order."""
    if temperature == 0.0:
        return max(range(len(logits)), key=lambda i: (logits[i], -i))
    top = max(logits)
    mass = [math.exp((x - top) / temperature) for x in logits]
    total, kept, before = math.fsum(mass), set(), 0.0
    for i in sorted(range(len(mass)), key=lambda i: (-mass[i], i)):
        if before < top_p * total or not kept:
            kept.add(i)
        before += mass[i]
    weights = [m if i in kept else 0.0 for i, m in enumerate(mass)]
    point, cumulative = uniform * math.fsum(weights), 0.0
    for i, weight in enumerate(weights):
        cumulative += weight
        if cumulative > point:
            return i
    raise AssertionError("the point lies beyond the total")


@QUICK
@given(st.integers(0, 10_000))
def test_a_mixed_batch_draws_what_a_slow_loop_draws_row_by_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-8, 8, (12, 9)) / 2).astype(np.float32)
    logits += np.arange(9, dtype=np.float32) / 64  # no ties
    temperature = rng.choice([0.0, 0.5, 1.0, 2.0], 12).tolist()
    top_p = rng.choice([0.3, 0.9, 1.0], 12).tolist()
    uniforms = rng.random(12).tolist()
    tokens = draw(policy_logprobs(torch.from_numpy(logits)), rows(temperature, top_p, uniforms))
    expected = [
        slow_draw(*row) for row in zip(logits.tolist(), temperature, top_p, uniforms, strict=True)
    ]
    assert tokens.tolist() == expected


def test_evenly_spread_numbers_give_each_token_its_probability() -> None:
    probs = torch.tensor([0.1, 0.0, 0.25, 0.6, 0.05])
    uniforms = ((np.arange(10_000) + 0.5) / 10_000).tolist()
    logprobs = policy_logprobs(probs.log()).expand(10_000, -1)
    tokens = draw(logprobs, rows([1.0] * 10_000, [1.0] * 10_000, uniforms))
    counts = torch.bincount(tokens, minlength=5)
    assert torch.allclose(counts / 10_000, probs, atol=2e-4)
    assert counts[1] == 0


def test_the_largest_number_never_selects_a_token_of_no_mass() -> None:
    largest = float(np.nextafter(1.0, 0.0))
    logits = torch.tensor([[0.0, 1.0, -math.inf], [-math.inf, 0.0, -math.inf]])
    assert draw(policy_logprobs(logits), rows([1.0] * 2, [1.0] * 2, [largest] * 2)).tolist() == [
        1,
        1,
    ]
    assert draw(policy_logprobs(logits), rows([1.0] * 2, [1.0] * 2, [0.0] * 2)).tolist() == [0, 1]
