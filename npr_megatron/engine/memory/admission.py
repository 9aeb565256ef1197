"""How much memory those who run will come to need, learnt from those that ended.

Reserving every token a request may generate leaves most of a pool unused, since few trajectories
use their whole budget and they do not all end at once; reserving too little costs replays. The
estimate decides how many trajectories run at once, never what they generate.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

_WINDOW = 32
"""Trajectories that are remembered. With 32, simulated groups of log-normal lengths replay 0 to 3 %
of their tokens; fewer adapt faster and replay more."""


class LengthEstimate:
    """The fractions of ``max_new_tokens`` that recent trajectories used.

    The memory begins full of trajectories that used everything, so the estimate comes down from the
    worst case as others end: the first to end are the short ones and are not to be believed alone.
    """

    def __init__(self) -> None:
        self._recent = deque([1.0] * _WINDOW)
        self._ordered = [1.0] * _WINDOW
        self._means = [1.0] * _WINDOW
        """Of each of ``_ordered`` and all that are longer."""

    def observe(self, num_generated: int, max_new_tokens: int) -> None:
        """Learn from a trajectory that ended by itself: not one that was aborted or timed out."""
        self._ordered.remove(self._recent.popleft())
        self._recent.append(min(1.0, num_generated / max_new_tokens))
        insort(self._ordered, self._recent[-1])
        sums = accumulate(reversed(self._ordered))
        self._means = [total / count for count, total in enumerate(sums, start=1)][::-1]

    def expected(self, max_new_tokens: int, already: int) -> int:
        """Return how many tokens a trajectory will have generated when it ends: the mean of those
        remembered that became longer than it is.

        Args:
            already: how many it has generated; one that is longer than all remembered ones is
                expected to use all it may.
        """
        first_longer = bisect_right(self._ordered, already / max_new_tokens)
        if first_longer == len(self._ordered):
            return max_new_tokens
        total = math.ceil(max_new_tokens * self._means[first_longer])
        return min(max(total, already + 1), max_new_tokens)


def peak_slots(held: Sequence[int], remaining: Sequence[int]) -> int:
    """Return how many slots will be held at once at most.

    All are taken to grow at the same pace and to give back everything when they end. Memory is at
    its highest just before one of them ends.

    Args:
        held: slots of each trajectory now; at least one trajectory.
        remaining: slots each of them will still take.

    Source:
        Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees" (ASPLOS 2025),
        section 3, as used by LightLLM.
    """
    left = np.asarray(remaining, np.int64)
    last_to_end_first = np.argsort(-left, kind="stable")
    left = left[last_to_end_first]
    held_by_those = np.asarray(held, np.int64)[last_to_end_first].cumsum()
    return int((held_by_those + left * np.arange(1, len(left) + 1)).max())
