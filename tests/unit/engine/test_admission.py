"""Expected lengths: on the safe side, never beyond the budget, learnt from what ended."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.engine.memory.admission import LengthEstimate
from tests.structures import QUICK

OBSERVATIONS = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 200)), max_size=200)


def estimate_of(observations: list[tuple[int, int]]) -> LengthEstimate:
    estimate = LengthEstimate()
    for num_generated, max_new_tokens in observations:
        estimate.observe(num_generated, max_new_tokens)
    return estimate


def test_the_worst_is_expected_until_something_has_ended() -> None:
    assert LengthEstimate().expected(1000, 0) == 1000


@QUICK
@given(OBSERVATIONS, st.integers(1, 5000), st.integers(0, 5000))
def test_more_than_there_is_and_less_than_the_budget(
    observations: list[tuple[int, int]], max_new_tokens: int, already: int
) -> None:
    already = min(already, max_new_tokens)
    expected = estimate_of(observations).expected(max_new_tokens, already)
    assert already <= expected <= max_new_tokens
    assert expected > already or already == max_new_tokens


@QUICK
@given(OBSERVATIONS, st.integers(1, 5000))
def test_a_trajectory_that_outgrew_the_expectation_is_expected_to_use_all(
    observations: list[tuple[int, int]], max_new_tokens: int
) -> None:
    estimate = estimate_of(observations)
    expected = estimate.expected(max_new_tokens, 0)
    assert estimate.expected(max_new_tokens, expected) == max_new_tokens


@QUICK
@given(OBSERVATIONS)
def test_equal_histories_give_equal_estimates(observations: list[tuple[int, int]]) -> None:
    assert estimate_of(observations).fraction == estimate_of(observations).fraction
    assert 0.0 <= estimate_of(observations).fraction <= 1.0


def test_a_few_short_ones_change_nothing_and_many_do() -> None:
    """The first to end are the short ones: believing them would overfill the pool."""
    assert estimate_of([(10, 100)] * 20).fraction == 1.0
    assert estimate_of([(10, 100)] * 100).fraction < 0.6
    assert 0.1 <= estimate_of([(10, 100)] * 1000).fraction < 0.11


def test_the_estimate_is_the_mean_and_two_deviations_of_what_ended_lately() -> None:
    generator = random.Random(0)
    lengths = [generator.choice([100, 300]) for _ in range(4000)]
    fraction = estimate_of([(length, 1000) for length in lengths]).fraction
    assert 0.3 < fraction < 0.5  # 0.2 + 2 * 0.1, of some tens of trajectories


def test_longer_ones_are_believed_at_once() -> None:
    history = [(100, 1000)] * 1000
    assert estimate_of(history + [(900, 1000)] * 3).fraction > 2 * estimate_of(history).fraction


def test_most_trajectories_stay_within_the_estimate() -> None:
    generator = random.Random(1)
    estimate = LengthEstimate()
    num_beyond = 0
    for number in range(3000):
        length = min(1000, int(generator.lognormvariate(5.0, 0.6)))
        num_beyond += number > 200 and length > estimate.expected(1000, 0)
        estimate.observe(length, 1000)
    assert num_beyond / 2800 < 0.1
