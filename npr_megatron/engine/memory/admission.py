"""How much a trajectory will generate, learnt from those that ended.

Reserving every token a request may generate leaves most of a pool unused, since few trajectories
use their whole budget; reserving too little costs replays. The estimate decides how many
trajectories run at once, never what they generate.
"""

from __future__ import annotations

import math

_MEMORY = 32
"""Trajectories after which the weight of an observation has fallen to 1/e."""
_NUM_DEVIATIONS = 2.0


class LengthEstimate:
    """The fraction of ``max_new_tokens`` that trajectories use, on the safe side.

    Mean and deviation of a history that fades, two deviations above the mean. It begins as if all
    had used everything, and believes otherwise only after some tens of trajectories: the first to
    end are the short ones.

    Source:
        exponentially weighted mean and variance: T. Finch, "Incremental calculation of weighted
        mean and variance" (2009), section 9.
    """

    def __init__(self) -> None:
        self._mean = 1.0
        self._variance = 0.0

    @property
    def fraction(self) -> float:
        """Expected share of the budget, 0..1."""
        return min(1.0, self._mean + _NUM_DEVIATIONS * math.sqrt(self._variance))

    def observe(self, num_generated: int, max_new_tokens: int) -> None:
        """Learn from a trajectory that ended by itself: not one that was aborted or timed out."""
        weight = 1 / _MEMORY
        error = min(1.0, num_generated / max_new_tokens) - self._mean
        self._mean += weight * error
        self._variance = (1 - weight) * (self._variance + weight * error**2)

    def expected(self, max_new_tokens: int, already: int) -> int:
        """Return how many tokens a trajectory will have generated when it ends.

        Args:
            already: how many it has generated; one that has outgrown the expectation is expected to
                use all it may.
        """
        total = math.ceil(self.fraction * max_new_tokens)
        return min(total, max_new_tokens) if already < total else max_new_tokens
