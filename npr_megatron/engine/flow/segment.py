"""Pieces of a trajectory, each growing on one stream.

Segments in order of creation, laid one after another, are the linear form of a trajectory: trunk,
branch 1, branch 2, ..., trunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from npr_megatron.engine.flow.distinct import DistinctTokens


class Segment:
    """Consecutive tokens of one stream: aligned lists, grown token by token."""

    __slots__ = (
        "_distinct",
        "block",
        "branch",
        "forced",
        "logprobs",
        "position_ids",
        "token_ids",
        "weight_versions",
    )

    def __init__(self, block: int, branch: int) -> None:
        self.block = block
        self.branch = branch
        self.token_ids: list[int] = []
        self.position_ids: list[int] = []
        self.forced: list[bool] = []
        self.logprobs: list[float] = []
        self.weight_versions: list[int] = []
        self._distinct: DistinctTokens | None = None

    @classmethod
    def of_prompt(cls, prompt_ids: Sequence[int]) -> Segment:
        """Return the trunk's first segment: the prompt, given and without log-probs."""
        segment = cls(0, 0)
        length = len(prompt_ids)
        segment.token_ids = list(prompt_ids)
        segment.position_ids = list(range(length))
        segment.forced = [True] * length
        segment.logprobs = [0.0] * length
        segment.weight_versions = [-1] * length
        return segment

    def append(
        self, token_id: int, position: int, forced: bool, logprob: float, version: int
    ) -> None:
        """Add one token."""
        self.token_ids.append(token_id)
        self.position_ids.append(position)
        self.forced.append(forced)
        self.logprobs.append(logprob)
        self.weight_versions.append(version)

    def distinct(self) -> DistinctTokens:
        """Return the distinct tokens so far; kept up to date from the first call on, at no cost to
        segments that nobody asks.
        """
        if self._distinct is None:
            self._distinct = DistinctTokens()
        self._distinct.read(self.token_ids, self.forced)
        return self._distinct


def linearise(segments: Sequence[Segment]) -> dict[str, npt.NDArray[Any]]:
    """Return the aligned streams of a trajectory (the fields of ``records.Trajectory`` of length
    T).
    """
    lengths = [len(segment.token_ids) for segment in segments]
    return {
        "token_ids": _chain([segment.token_ids for segment in segments], np.int32),
        "position_ids": _chain([segment.position_ids for segment in segments], np.int32),
        "block": np.repeat(np.array([s.block for s in segments], np.int32), lengths),
        "branch": np.repeat(np.array([s.branch for s in segments], np.int32), lengths),
        "forced": _chain([segment.forced for segment in segments], np.bool_),
        "logprobs": _chain([segment.logprobs for segment in segments], np.float32),
        "weight_versions": _chain([segment.weight_versions for segment in segments], np.int32),
    }


def _chain(lists: Sequence[Sequence[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    if len(lists) == 1:
        return np.array(lists[0], dtype=dtype)
    return np.array(list(itertools.chain.from_iterable(lists)), dtype=dtype)
