"""Advantages against the equations, spelled out."""

from __future__ import annotations

import numpy as np
import pytest

from npr_megatron.errors import InputError
from npr_megatron.train.advantages import dapo_advantages, papo_advantages


def test_papo_subtracts_the_group_mean_and_divides_by_the_batch_std():
    rewards = [[1, 1, -1], [-1, 1], [1, 1, 1, 1]]
    batch_std = np.std([1, 1, -1, -1, 1, 1, 1, 1, 1]) + 1e-6
    first, second, third = papo_advantages(rewards)
    np.testing.assert_allclose(first, (np.array([1, 1, -1]) - 1 / 3) / batch_std, rtol=1e-6)
    np.testing.assert_allclose(second, np.array([-1, 1]) / batch_std, rtol=1e-6)
    np.testing.assert_array_equal(third, np.zeros(4))


def test_papo_drops_singletons_and_their_rewards_do_not_touch_the_std():
    with_singleton = papo_advantages([[1, -1], [-1], []])
    assert with_singleton[1:] == [None, None]
    np.testing.assert_array_equal(with_singleton[0], papo_advantages([[1, -1]])[0])


def test_papo_does_not_depend_on_the_order_of_groups():
    groups = [[1, -1, 1], [1, -1], [-1, -1, 1, 1]]
    forwards, backwards = papo_advantages(groups), papo_advantages(groups[::-1])[::-1]
    for one, other in zip(forwards, backwards, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_papo_of_equal_rewards_is_zero_not_a_division_by_zero():
    (advantages,) = papo_advantages([[1, 1]])
    np.testing.assert_array_equal(advantages, [0, 0])


def test_papo_of_nothing_is_nothing():
    assert papo_advantages([[1], []]) == [None, None]


def test_dapo_normalises_within_the_group_and_drops_groups_without_spread():
    first, second, third = dapo_advantages([[2, 0], [-2, -2, -2], [1]])
    np.testing.assert_allclose(first, [1, -1], rtol=1e-5)
    assert second is None and third is None


@pytest.mark.parametrize("rewards", [[1.0, float("nan")], [[1.0], [2.0]]])
def test_rewards_that_are_no_finite_vector_are_refused(rewards):
    with pytest.raises(InputError, match="finite"):
        papo_advantages([rewards])
