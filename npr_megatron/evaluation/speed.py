"""How much faster native branch-parallel decoding is than sequential decoding of the same model.

Batch 1, one engine in this process, same prompts, same sampling: tokens per second both ways and
their ratio. Times on a shared machine are noisy; the modes alternate problem by problem, so the
ratio holds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from npr_megatron.engine.interface import Engine
from npr_megatron.errors import DivergenceError
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import FinishReason, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens per second at batch 1."""

    tokens_per_s_native: float
    tokens_per_s_sequential: float

    @property
    def speedup(self) -> float:
        """Native over sequential."""
        return self.tokens_per_s_native / self.tokens_per_s_sequential


def measure_speed(
    engine: Engine, pairs: Sequence[tuple[GenerationRequest, GenerationRequest]]
) -> Speed:
    """Decode (native, sequential) pairs of requests one at a time.

    The first pair warms caches and is not counted where there is more than one.
    """
    counted = pairs[1:] or pairs
    for request in chain.from_iterable(pairs[:1]):
        _timed(engine, request)
    totals = [[0, 0.0], [0, 0.0]]
    for pair in counted:
        for total, request in zip(totals, pair, strict=True):
            trajectory, seconds = _timed(engine, request)
            total[0] += trajectory.num_tokens
            total[1] += seconds
    return Speed(
        tokens_per_s_native=totals[0][0] / totals[0][1],
        tokens_per_s_sequential=totals[1][0] / totals[1][1],
    )


def _timed(engine: Engine, request: GenerationRequest) -> tuple[Trajectory, float]:
    started = time.perf_counter()
    (trajectory,) = engine.generate([request])
    if trajectory.finish is FinishReason.FAILED:
        raise DivergenceError(f"speed cannot be measured: {trajectory.finish_detail}")
    return trajectory, time.perf_counter() - started
