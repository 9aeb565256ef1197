"""Expected lengths and the memory they add up to: within the budget, learnt from what ended."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.engine.memory.admission import LengthEstimate, peak_slots
from tests.structures import QUICK

OBSERVATIONS = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 200)), max_size=100)


def estimate_of(observations: list[tuple[int, int]]) -> LengthEstimate:
    estimate = LengthEstimate()
    for num_generated, max_new_tokens in observations:
        estimate.observe(num_generated, max_new_tokens)
    return estimate


def test_the_worst_is_expected_until_something_has_ended() -> None:
    assert LengthEstimate().expected(1000, 0) == 1000


@QUICK
@given(OBSERVATIONS, st.integers(1, 5000), st.integers(0, 5000))
def test_more_than_there_is_and_no_more_than_the_budget(
    observations: list[tuple[int, int]], max_new_tokens: int, already: int
) -> None:
    already = min(already, max_new_tokens)
    expected = estimate_of(observations).expected(max_new_tokens, already)
    assert already <= expected <= max_new_tokens
    assert expected > already or already == max_new_tokens


@QUICK
@given(OBSERVATIONS, st.integers(1, 5000), st.integers(0, 5000))
def test_it_is_the_mean_of_the_longer_ones_among_the_last_32(
    observations: list[tuple[int, int]], max_new_tokens: int, already: int
) -> None:
    last = ([1.0] * 32 + [min(1.0, used / most) for used, most in observations])[-32:]
    longer = [fraction * max_new_tokens for fraction in last if fraction > already / max_new_tokens]
    expected = estimate_of(observations).expected(max_new_tokens, already)
    if already < max_new_tokens:
        mean = sum(longer) / len(longer) if longer else max_new_tokens
        assert abs(expected - min(max(mean, already + 1), max_new_tokens)) <= 1.0 + 1e-6


@QUICK
@given(OBSERVATIONS, st.lists(st.integers(0, 1000), min_size=2, max_size=9))
def test_the_longer_a_trajectory_is_the_longer_it_is_expected_to_become(
    observations: list[tuple[int, int]], lengths: list[int]
) -> None:
    estimate = estimate_of(observations)
    expected = [estimate.expected(1000, length) for length in sorted(lengths)]
    assert expected == sorted(expected)


def test_what_ended_long_ago_is_forgotten() -> None:
    late = [(25, 100)] * 32
    assert estimate_of([(90, 100)] * 500 + late).expected(1000, 0) == 250
    assert estimate_of(late).expected(1000, 0) == 250
    assert estimate_of(late[:16]).expected(1000, 0) == 625


def ended_one_by_one(held: list[int], remaining: list[int]) -> int:
    """Let all grow by one slot at a time; note the highest sum there is."""
    live = [(slots, slots + more) for slots, more in zip(held, remaining, strict=True)]
    peak = 0
    while live:
        peak = max(peak, sum(slots for slots, _ in live))
        live = [(slots + 1, end) for slots, end in live if slots < end]
    return peak


@QUICK
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=12))
def test_the_peak_is_that_of_growing_token_by_token(trees: list[tuple[int, int]]) -> None:
    held, remaining = [list(column) for column in zip(*trees, strict=True)]
    assert peak_slots(held, remaining) == ended_one_by_one(held, remaining)


def test_trajectories_that_end_at_different_times_need_less_than_the_sum_of_their_lengths() -> None:
    generator = random.Random(0)
    remaining = [generator.randint(1, 1000) for _ in range(100)]
    assert peak_slots([0] * 100, remaining) < 0.6 * sum(remaining)
    assert peak_slots([0] * 100, [500] * 100) == 50_000
