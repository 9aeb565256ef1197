"""The experts that computed a trajectory, put together from what SGLang reports with its stages.

SGLang keeps the experts of every token beside its keys and values, and reports those of a row up to
its last computed token. A row of the trunk is the linear form: joined branches lie in it in order,
so the last stage of the trunk reports everything before it. A branch reports its own tokens and the
two before them, with which the trunk ends: only branches have computed these so far.

What nobody reported is -1, and the trainer's router is free there: the end of a branch whose block
was never joined, and a branch that was cut off in the middle of a stage.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.flow.flow import Flow
from npr_megatron.records.trajectory import RouteArray

NUM_SHARED = 2
"""Tokens of the trunk that a branch reports: ``</guideline>`` and the newline behind it."""


class RouteBook:
    """Routes of one trajectory, over all its lives."""

    def __init__(self, model: ModelConfig) -> None:
        moe = model.moe
        assert moe is not None, "only models with experts have routes"
        self._reported = (model.num_hidden_layers, moe.num_experts_per_tok)
        self._num_dense = moe.num_dense_layers
        self._trunk = self._read(np.zeros(0, np.int16))
        self._branches: dict[int, RouteArray] = {}

    def take(self, branch: int, reported: npt.NDArray[Any]) -> None:
        """Take what a stage reported.

        Args:
            branch: whose stage it was, 0 for the trunk; it reports from its first token on, a
                branch from ``NUM_SHARED`` tokens before.
            reported: experts of its tokens in all layers, in one row.
        """
        routes = self._read(reported)
        if branch:
            self._branches[branch] = routes
        else:
            self._trunk, self._branches = routes, {}

    def routes(self, flow: Flow) -> RouteArray:
        """Return [T, M, K] of the trajectory of ``flow``."""
        branches = [stream.segment for stream in flow.branches]
        num_tokens = sum(len(segment.token_ids) for segment in flow.segments)
        fork = num_tokens - sum(len(segment.token_ids) for segment in branches)
        found = np.full((num_tokens, *self._trunk.shape[1:]), -1, np.int16)
        _write(self._trunk, found[:fork])
        start = fork
        for segment in branches:
            stop = start + len(segment.token_ids)
            if segment.branch in self._branches:
                own = self._branches[segment.branch]
                found[fork - NUM_SHARED : fork] = own[:NUM_SHARED]
                _write(own[NUM_SHARED:], found[start:stop])
            start = stop
        return found

    def _read(self, reported: npt.NDArray[Any]) -> RouteArray:
        return reported.astype(np.int16).reshape(-1, *self._reported)[:, self._num_dense :]


def _write(routes: RouteArray, place: RouteArray) -> None:
    """Write ``routes`` to the beginning of ``place``, without what was never accepted."""
    place[: len(routes)] = routes[: len(place)]
