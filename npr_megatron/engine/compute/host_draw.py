"""Draws from logits on a CPU: what ``cdf.inverse_cdf`` and ``cdf.log_totals`` do, in one loop.

A row is read twice, once for its maximum and once for its weights, and every row by itself, so a
draw does not depend on who shares the step. Sums are float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba.extending import register_jitable

from npr_megatron.engine.compiled import compiled, inlined
from npr_megatron.engine.compute.host_kernels import Floats, Indices, exp
from npr_megatron.records import randomness
from npr_megatron.records.randomness import UInt64Array

register_jitable(randomness.mix)
_uniforms = inlined(randomness.uniforms)

_BLOCK = 128
"""Tokens whose weights are summed together: the search for a token passes over whole blocks."""
_LEAST = np.float32(-40.0)
"""Logits so far below the largest have no weight: 4e-18 of it."""

Doubles = npt.NDArray[np.float64]


class Drawn(NamedTuple):
    """S tokens drawn, and the log-probs of M."""

    tokens: Indices
    """[S]"""
    logprobs: Doubles
    """[M] of these tokens, then of those known: NaN where a row is no distribution."""
    totals: Doubles
    """[M] log-sum-exp of each row."""


def draw_next(logits: Floats, keys: UInt64Array, counters: UInt64Array, known: Indices) -> Drawn:
    """Draw a token from each of the first S of [M, V] logits; look up the ``known`` ones of the
    others.

    Args:
        keys: [S] of ``randomness.uniforms``.
        counters: [S]
        known: [M - S] ids.
    """
    tokens = np.empty(len(logits), np.int64)
    logprobs, totals = np.empty(len(logits)), np.empty(len(logits))
    _draw_next(logits, keys, counters, known, tokens, logprobs, totals)
    return Drawn(tokens[: len(keys)], logprobs, totals)


def draw_and_total(logits: Floats, uniforms: Doubles) -> tuple[Indices, Doubles]:
    """Return one token per row of [M, V] logits, and [M] float64 log-sum-exp.

    The token is the first whose cumulative weight exceeds ``uniform * total``; it has weight. A row
    with NaN gives some token, and NaN.
    """
    tokens = np.empty(len(logits), np.int64)
    totals = np.empty(len(logits), np.float64)
    _draw(logits, uniforms, tokens, totals)
    return tokens, totals


@compiled
def _draw_next(
    logits: Floats,
    keys: UInt64Array,
    counters: UInt64Array,
    known: Indices,
    tokens: Indices,
    logprobs: Doubles,
    totals: Doubles,
) -> None:
    num_drawn = len(keys)
    numbers = np.zeros(len(logits))
    numbers[:num_drawn] = _uniforms(keys, counters)
    _draw(logits, numbers, tokens, totals)
    tokens[num_drawn:] = known
    for row in range(len(logits)):
        if not 0 <= tokens[row] < logits.shape[1]:
            raise IndexError("a known token is not in the vocabulary")
        logprobs[row] = np.float64(logits[row, tokens[row]]) - totals[row]


@compiled
def _draw(logits: Floats, uniforms: Doubles, tokens: Indices, totals: Doubles) -> None:
    num_rows, num_tokens = logits.shape
    num_blocks = (num_tokens + _BLOCK - 1) // _BLOCK
    weights = np.empty(num_tokens, np.float32)
    sums = np.empty(num_blocks, np.float64)
    for row in range(num_rows):
        scores = logits[row]
        top = scores[0]
        for j in range(num_tokens):
            top = scores[j] if scores[j] > top else top
        total = 0.0
        for block in range(num_blocks):
            start, stop = block * _BLOCK, min(num_tokens, (block + 1) * _BLOCK)
            sums[block] = _weigh(scores[start:stop], top, weights[start:stop])
            total += sums[block]
        totals[row] = np.float64(top) + np.log(total)
        tokens[row] = _find(weights, sums, uniforms[row] * total)


@inlined
def _weigh(scores: Floats, top: np.float32, weights: Floats) -> float:
    """Write the weights of some scores; return their sum."""
    total = 0.0
    for j in range(len(scores)):
        score = scores[j] - top
        weight = np.float32(0.0) if score < _LEAST else exp(score)
        weights[j] = weight
        total += np.float64(weight)
    return total


@inlined
def _find(weights: Floats, sums: Doubles, point: float) -> int:
    """Return the first token whose cumulative weight exceeds ``point``, or the last with weight."""
    block, last = 0, len(sums) - 1
    while last > 0 and sums[last] == 0.0:
        last -= 1
    while block < last and point >= sums[block]:
        point -= sums[block]
        block += 1
    found = block * _BLOCK
    for token in range(found, min(len(weights), found + _BLOCK)):
        if weights[token] > np.float32(0.0):
            found = token
            point -= np.float64(weights[token])
            if point < 0.0:
                break
    return found
