"""The learning rate at hand-computed steps."""

from __future__ import annotations

import pytest

from npr_megatron.config.training import OptimizerConfig
from npr_megatron.train.schedule import learning_rate


def rates(num_steps, **config):
    optimizer = OptimizerConfig(learning_rate=1.0, **config)
    return [learning_rate(optimizer, step, num_steps) for step in range(num_steps)]


def test_linear_warms_up_to_the_peak_and_ends_at_the_floor():
    assert rates(6, warmup_steps=2, decay="linear", min_learning_rate_frac=0.2) == pytest.approx(
        [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]
    )


def test_cosine_is_halfway_in_the_middle():
    assert rates(5, decay="cosine") == pytest.approx(
        [1.0, 0.8535533905932737, 0.5, 0.1464466094067262, 0.0]
    )


def test_constant_stays_after_warm_up():
    assert rates(4, warmup_steps=2, decay="constant") == [0.5, 1.0, 1.0, 1.0]


def test_steps_beyond_the_last_keep_the_floor():
    optimizer = OptimizerConfig(learning_rate=2.0, min_learning_rate_frac=0.25)
    assert learning_rate(optimizer, 99, 10) == pytest.approx(0.5)


def test_a_single_step_runs_at_the_peak():
    assert rates(1) == [1.0]
