"""Sampling: exact inverse CDF, exact filters, and no row that feels its neighbours.

``tests/parity/test_sampling_hf.py`` holds filters and penalties against Transformers'.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.engine.compute.cdf import log_totals, log_totals_in_torch
from npr_megatron.engine.compute.host_draw import draw_and_total, draw_next
from npr_megatron.engine.compute.sampler import SamplingRows, choose, draw, draw_plain
from npr_megatron.engine.flow.flow import Flow
from npr_megatron.records.trajectory import DecodeMode
from npr_megatron.schema.grammar import Grammar
from tests.engines import request_for
from tests.structures import QUICK, SMALL

Totals = Callable[[torch.Tensor], torch.Tensor]
Shape = tuple[float, int, float, float]
"""Temperature, top-k, top-p, min-p."""
PLAIN: Shape = (1.0, 0, 1.0, 0.0)
LARGEST = float(np.nextafter(1.0, 0.0))
SHAPES: list[Shape] = [
    PLAIN,
    (0.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (1.0, 5, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.5, 40, 0.95, 0.02),
]


def rows(shapes: Sequence[Shape], uniforms: Sequence[float]) -> SamplingRows:
    return SamplingRows(np.array(shapes, dtype=np.float64), np.array(uniforms))


def slow_draw(logits: Sequence[float], shape: Shape, uniform: float) -> int:
    """One row by plain Python: temperature, top-k, top-p, min-p, inverse CDF in id order."""
    temperature, top_k, top_p, min_p = shape
    if temperature == 0.0:
        return max(range(len(logits)), key=lambda i: (logits[i], -i))
    top = max(logits)
    mass = {i: math.exp((x - top) / temperature) for i, x in enumerate(logits)}
    ranked = sorted(mass, key=lambda i: (-mass[i], i))
    ranked = ranked[: top_k or None]
    total, kept, before = math.fsum(mass[i] for i in ranked), [], 0.0
    for i in ranked:
        if (before < top_p * total or not kept) and mass[i] >= min_p:
            kept.append(i)
        before += mass[i]
    point, cumulative = uniform * math.fsum(mass[i] for i in kept), 0.0
    for i in sorted(kept):
        cumulative += mass[i]
        if cumulative > point:
            return i
    raise AssertionError("the point lies beyond the total")


@pytest.mark.parametrize("num_tokens", [1, 9, 128, 129, 512, 6000])
def test_one_loop_draws_what_a_slow_loop_draws(num_tokens: int) -> None:
    rng = np.random.default_rng(num_tokens)
    logits = rng.normal(0.0, 3.0, (40, num_tokens)).astype(np.float32)
    logits[1] -= 200.0
    logits[2, 1:] -= 60.0
    uniforms = rng.random(40)
    uniforms[:4] = 0.0, 1.0 - 1e-9, 1.0 - 1e-9, 0.0
    tokens, totals = draw_and_total(logits, uniforms)
    pairs = zip(logits.tolist(), uniforms.tolist(), strict=True)
    assert tokens.tolist() == [slow_draw(row, PLAIN, number) for row, number in pairs]
    expected = torch.logsumexp(torch.from_numpy(logits).double(), dim=-1).numpy()
    assert np.abs(totals - expected).max() < 1e-7


def test_one_loop_never_draws_a_token_of_no_mass() -> None:
    """Neither in front of all others nor behind them, where whole blocks have none."""
    logits = np.full((64, 6000), -500.0, np.float32)
    logits[:, 700:1500] = np.random.default_rng(0).normal(0.0, 3.0, (64, 800))
    for number in (0.0, 5e-324, LARGEST):
        tokens, _ = draw_and_total(logits, np.full(64, number))
        assert ((tokens >= 700) & (tokens < 1500)).all()


def test_a_known_token_outside_of_the_vocabulary_is_refused() -> None:
    nothing = np.zeros(0, np.uint64)
    for token in (-1, 9):
        with pytest.raises(IndexError, match="vocabulary"):
            draw_next(np.zeros((1, 9), np.float32), nothing, nothing, np.array([token]))


@QUICK
@given(st.integers(0, 10_000))
def test_a_mixed_batch_draws_what_a_slow_loop_draws_row_by_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.integers(-8, 8, (12, 9)) / 2).astype(np.float32)
    logits += np.arange(9, dtype=np.float32) / 64  # no ties
    options = ([0.0, 0.5, 1.0, 2.0], [0, 1, 3, 8, 50], [0.3, 0.9, 1.0], [0.0, 0.13, 1.0])
    shapes = [tuple(rng.choice(option).item() for option in options) for _ in logits]
    uniforms = rng.random(12).tolist()
    tokens = draw(torch.from_numpy(logits), rows(shapes, uniforms))
    expected = [slow_draw(*row) for row in zip(logits.tolist(), shapes, uniforms, strict=True)]
    assert tokens.tolist() == expected


@pytest.mark.parametrize("num_tokens", [2048, 2049, 5000, 6400])
def test_large_vocabularies_are_searched_block_by_block_to_the_same_end(num_tokens: int) -> None:
    rng = np.random.default_rng(num_tokens)
    logits = rng.normal(0.0, 3.0, (24, num_tokens)).astype(np.float32)
    shapes = [SHAPES[i % len(SHAPES)] for i in range(24)]
    # A point must be further from the next token than fp32 probabilities are apart.
    uniforms = np.round(rng.random(24), 3)
    tokens = draw(torch.from_numpy(logits), rows(shapes, uniforms))
    expected = [slow_draw(*row) for row in zip(logits.tolist(), shapes, uniforms, strict=True)]
    assert tokens.tolist() == expected


@pytest.mark.parametrize("num_tokens", [9, 512, 5000])
def test_a_row_is_drawn_alike_alone_and_in_any_company(num_tokens: int) -> None:
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(0.0, 3.0, (35, num_tokens)).astype(np.float32))
    wanted = rows([SHAPES[i % len(SHAPES)] for i in range(35)], rng.random(35))
    together = draw(scores, wanted).tolist()
    alone = [draw(scores[i : i + 1], wanted.take(slice(i, i + 1))).item() for i in range(35)]
    assert alone == together
    order = rng.permutation(35)
    shuffled = draw(scores[torch.from_numpy(order)], wanted.take(order)).tolist()
    assert shuffled == [together[i] for i in order]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(num_threads, 2))
    try:
        assert draw(scores, wanted).tolist() == together
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("num_tokens", [500, 6000])
def test_no_order_of_summation_changes_the_point_at_which_the_next_token_begins(
    num_tokens: int,
) -> None:
    """Weights are multiples of 2^-52, so the CDF of any permutation has the same end, to the bit:
    a number just below a token's beginning selects the one before, however the sums were taken.
    """
    rng = np.random.default_rng(3)
    scores = torch.from_numpy(rng.normal(0.0, 4.0, (1, num_tokens)).astype(np.float32))
    weights = torch.softmax(scores, dim=-1)
    weights = ((weights + 2.0**-29) - 2.0**-29)[0].double().numpy()
    ends = np.array([math.fsum(weights[: i + 1]) for i in range(num_tokens)])
    tokens = rng.choice(np.flatnonzero(weights[1:] > 2.0**-30), 40) + 1
    for token in tokens.tolist():
        border = ends[token - 1] / ends[-1]
        while border * ends[-1] >= ends[token - 1]:
            border = np.nextafter(border, 0.0)
        below, above = border, np.nextafter(border, 1.0)
        drawn = [draw(scores, rows([PLAIN], [u])).item() for u in (below, above)]
        assert drawn[0] < token <= drawn[1]


def test_evenly_spread_numbers_give_each_token_its_probability() -> None:
    probs = torch.tensor([0.1, 0.0, 0.25, 0.6, 0.05])
    uniforms = ((np.arange(10_000) + 0.5) / 10_000).tolist()
    logits = (probs.log() + 3.0).expand(10_000, -1)
    tokens = draw(logits, rows([PLAIN] * 10_000, uniforms))
    counts = torch.bincount(tokens, minlength=5)
    assert torch.allclose(counts / 10_000, probs, atol=2e-4)
    assert counts[1] == 0


@pytest.mark.parametrize("num_padding", [0, 5000])
def test_the_largest_number_never_selects_a_token_of_no_mass(num_padding: int) -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf], [-math.inf, 0.0, -math.inf]])
    logits = torch.nn.functional.pad(logits, (0, num_padding), value=-math.inf)
    for uniform, expected in ((LARGEST, [1, 1]), (0.0, [0, 1])):
        assert draw(logits, rows([PLAIN] * 2, [uniform] * 2)).tolist() == expected


@pytest.mark.parametrize("temperature", [1e-5, 1e5])
def test_the_extremes_of_temperature_stay_finite(temperature: float) -> None:
    logits = torch.tensor([[3.0, 1e4, -1e4, -math.inf]])
    tokens = {draw(logits, rows([(temperature, 0, 1.0, 0.0)], [u])).item() for u in (0.0, LARGEST)}
    assert tokens == ({1} if temperature < 1 else {0, 2})


def test_tokens_of_equal_weight_stay_or_go_together() -> None:
    logits = torch.tensor([[2.0, 0.0, 2.0, 1.0]])
    for shape in ((1.0, 1, 1.0, 0.0), (1.0, 0, 0.1, 0.0), (1.0, 0, 1.0, 1.0)):
        drawn = {draw(logits, rows([shape], [u])).item() for u in (0.0, 0.3, 0.6, LARGEST)}
        assert drawn == {0, 2}


@pytest.mark.parametrize("num_tokens", [9, 5000])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_nan_disturbs_no_other(shape: Shape, num_tokens: int) -> None:
    rng = np.random.default_rng(1)
    scores = torch.from_numpy(rng.normal(0.0, 3.0, (6, num_tokens)).astype(np.float32))
    wanted = rows([shape] * 6, rng.random(6))
    expected = draw(scores, wanted)
    scores[2] = math.nan
    found = draw(scores, wanted)
    keep = [0, 1, 3, 4, 5]
    assert found[keep].tolist() == expected[keep].tolist()
    assert 0 <= int(found[2]) < num_tokens


def test_scores_are_left_as_they_were() -> None:
    scores = torch.randn(len(SHAPES), 50)
    before = scores.clone()
    draw(scores, rows(SHAPES, [0.5] * len(SHAPES)))
    assert torch.equal(scores, before)


def test_logits_and_log_probs_give_the_same_draws() -> None:
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.normal(0.0, 3.0, (70, 40)).astype(np.float32))
    wanted = rows(list(itertools.islice(itertools.cycle(SHAPES), 70)), np.round(rng.random(70), 3))
    assert draw(logits, wanted).tolist() == draw(torch.log_softmax(logits, -1), wanted).tolist()


@pytest.mark.parametrize("totals", [log_totals, log_totals_in_torch])
@pytest.mark.parametrize("num_tokens", [9, 512, 151_936])
@pytest.mark.parametrize(("scale", "offset"), [(0.1, 0.0), (3.0, 30.0), (8.0, -200.0)])
def test_log_totals_are_exact_where_single_precision_is_not(
    num_tokens: int, scale: float, offset: float, totals: Totals
) -> None:
    rng = np.random.default_rng(num_tokens)
    numbers = rng.normal(offset, scale, (3, num_tokens)).astype(np.float32)
    logits = torch.from_numpy(numbers)
    expected = torch.logsumexp(logits.double(), dim=-1)
    assert (totals(logits) - expected).abs().max() < 1e-7
    if num_tokens > 500 and offset:
        assert (logits.logsumexp(dim=-1) - expected).abs().max() > 3e-7, "what it is for"


@pytest.mark.parametrize("totals", [log_totals, log_totals_in_torch])
@pytest.mark.parametrize("num_tokens", [9, 512, 6000])
def test_a_total_is_the_same_in_any_company_and_nan_where_there_is_no_distribution(
    num_tokens: int, totals: Totals
) -> None:
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(rng.normal(0.0, 3.0, (60, num_tokens)).astype(np.float32))
    together = totals(logits)
    assert torch.equal(together, torch.cat([totals(row[None]) for row in logits]))
    logits[7, 3], logits[8, 4], logits[9] = math.nan, math.inf, -math.inf
    logits[10, 5] = -math.inf
    found = totals(logits)
    assert (~found.isfinite()).nonzero()[:, 0].tolist() == [7, 8, 9]
    assert torch.equal(found[11:], together[11:])
    assert totals(logits[:0]).shape == (0,)


@pytest.mark.parametrize("num_tokens", [9, 6000])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.8])
def test_choosing_is_drawing_and_totalling_with_rows_to_spare(
    num_tokens: int, temperature: float
) -> None:
    """Rows behind the streams are those of known tokens; draws and totals share a softmax."""
    rng = np.random.default_rng(6)
    logits = torch.from_numpy(rng.normal(0.0, 3.0, (60, num_tokens)).astype(np.float32))
    requests = [
        request_for((20,), seed=i, mode=DecodeMode.SEQUENTIAL, temperature=temperature)
        for i in range(50)
    ]
    streams = [Flow(request, Grammar(SMALL), SMALL.eos).trunk for request in requests]
    known = [row % num_tokens for row in range(10)]

    def expected(tokens: list[int]) -> list[float]:
        return [float(x) for x in logits[torch.arange(60), tokens + known] - log_totals(logits)]

    tokens, logprobs = choose(logits, streams, known)
    assert tokens == draw(logits[:50], SamplingRows.of(streams)).tolist()
    assert logprobs == expected(tokens)
    if temperature == 1.0:
        numbers = SamplingRows.of(streams).uniforms
        drawn, totals = draw_plain(logits, numbers)
        assert drawn[:50].tolist() == tokens
        assert (totals - log_totals(logits)).abs().max() < 1e-7
    nothing, behind = choose(logits[50:], [], known)
    assert nothing == []
    assert behind == logprobs[50:]
    logits[3] = math.nan
    others, logprobs = choose(logits, streams, known)
    assert [t for i, t in enumerate(others) if i != 3] == [
        t for i, t in enumerate(tokens) if i != 3
    ]
    assert [row for row, logprob in enumerate(logprobs) if not math.isfinite(logprob)] == [3]
    assert 0 <= others[3] < num_tokens
