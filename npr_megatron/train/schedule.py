"""The learning rate of each optimizer step: a pure function, so a resumed run needs no state."""

from __future__ import annotations

import math

from npr_megatron.config.training import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0) of ``num_steps``.

    Rises linearly over ``warmup_steps`` and reaches its peak at the last of them, then decays to
    ``min_learning_rate_frac`` of the peak at the last step, and stays there.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.learning_rate
    first = max(config.warmup_steps - 1, 0)  # the step at the peak
    progress = min((step - first) / max(num_steps - 1 - first, 1), 1.0)
    if config.decay == "linear":
        remaining = 1.0 - progress
    else:
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    low = config.min_learning_rate_frac
    return config.learning_rate * (low + (1.0 - low) * remaining)
