"""Scores to tokens, a whole batch at a time, by inverse CDF in float64.

The draw is a pure function of a row's scores and one uniform number, and the number is a pure
function of (request seed, block, branch, index) (``records.randomness``). So which requests happen
to share a step does not change a sample. Whatever shapes the draw, the recorded log-probs are of
the full distribution at temperature 1, which is the policy the trainer differentiates.

Order: penalties, temperature, top-k, top-p, min-p; each filter works on what the one before left,
and the mass that top-p counts is of the tokens that top-k left. This is the order of Transformers'
``generate``; vLLM and SGLang apply min-p before top-p, or all at once, which differs only where
min-p trims the mass that top-p counts. Every filter keeps the likeliest tokens down to some weight,
so it is one threshold per row, and tokens of equal weight stay or go together. Rows at the defaults
pay for none of it.

Sums do not depend on their order, so neither on the batch, nor on threads, nor on the device:
weights are rounded to multiples of 2^-52, and sums of such numbers below 2 are exact in float64.
That is what lets the CDF be searched in two levels, blocks first, without changing a draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from npr_megatron.engine.compute.penalties import penalised
from npr_megatron.engine.flow.flow import Stream
from npr_megatron.records.randomness import uniforms

_FLAT = 2048
"""Largest vocabulary whose CDF is searched in one level."""
_BLOCK = 128
"""Tokens per block where there are two levels."""
_CHUNK = 1 << 18
"""Weights that a CPU works on at once: 1 MiB stays in its cache."""
_ROUNDING = 2.0**-29
"""fp32 numbers of [2^-29, 2^-28) are spaced 2^-52: adding and subtracting it rounds to that."""
_FIRST_LOOK = 64
"""Likeliest tokens that top-p looks at first; where they lack mass, eight times as many."""

FloatRows = npt.NDArray[np.float64]
_PLAIN = np.array([1.0, 0.0, 1.0, 0.0])


@dataclass(frozen=True, slots=True, eq=False)
class SamplingRows:
    """How each of M rows is drawn, as aligned arrays."""

    shape: FloatRows
    """[M, 4] ``temperature``, ``top_k``, ``top_p``, ``min_p`` of ``GenerationRequest``."""
    uniforms: FloatRows
    """[M] in [0, 1)."""

    @classmethod
    def of(cls, streams: Sequence[Stream]) -> SamplingRows:
        """Return what the requests of ``streams`` ask for, and each stream's next number."""
        requests = [stream.flow.request for stream in streams]
        shape = [(r.temperature, r.top_k, r.top_p, r.min_p) for r in requests]
        numbers = uniforms(
            np.array([stream.key for stream in streams], dtype=np.uint64),
            np.array([stream.index for stream in streams], dtype=np.uint64),
        )
        return cls(np.array(shape, dtype=np.float64), numbers)

    @property
    def temperature(self) -> FloatRows:
        """[M] 0.0 is greedy."""
        return self.shape[:, 0]

    @property
    def are_plain(self) -> bool:
        """Whether every row is drawn from the full distribution at temperature 1."""
        return bool((self.shape == _PLAIN).all())

    def take(self, rows: npt.NDArray[np.intp] | slice) -> SamplingRows:
        """Return the given rows only."""
        return SamplingRows(self.shape[rows], self.uniforms[rows])


def choose(logits_MV: Tensor, streams: Sequence[Stream]) -> tuple[list[int], Tensor]:
    """Return one token per stream, and the log-sum-exp of every row.

    Tokens are sampled under the stream's request, or its teacher's.

    Args:
        logits_MV: [M, V] fp32, row i of ``streams[i]``; rows behind them only get their total. Not
            modified. A row of NaN gives some token and disturbs no other.

    Returns:
        The tokens, and [M] float64 as of :func:`log_totals`.
    """
    if not streams:
        return [], log_totals(logits_MV)
    rows, own_MV = SamplingRows.of(streams), logits_MV[: len(streams)]
    scores_MV = penalised(own_MV, streams)
    if rows.are_plain and scores_MV is own_MV:
        drawn_M, totals_M = _draw_and_total(logits_MV, rows.uniforms)
    else:
        drawn_M, totals_M = draw(scores_MV, rows), log_totals(logits_MV)
    tokens: list[int] = drawn_M.tolist()[: len(streams)]
    for row, stream in enumerate(streams):
        if stream.flow.teacher is not None:
            segment = stream.segment
            taught = stream.flow.teacher(segment.block, segment.branch, stream.index)
            tokens[row] = tokens[row] if taught is None else taught
    return tokens, totals_M


def log_totals(logits_MV: Tensor) -> Tensor:
    """Return [M] float64 log-sum-exp: logits minus these are the policy's log-probs. NaN where a
    row is no distribution.

    Good to 1e-7 whatever the size of logits and vocabulary; ``logsumexp`` in fp32 errs by 4e-6 and
    ``log_softmax`` by 9e-6 over 151,936 tokens, as much as trainer and engine may differ.
    """
    parts: list[Tensor] = []
    for chunk in _chunks(logits_MV):
        weights_MV = torch.softmax(logits_MV[chunk], dim=-1)
        top = weights_MV.amax(dim=-1)
        total = _rounded(weights_MV).sum(dim=-1, dtype=torch.float64)
        parts.append(_log_total(logits_MV[chunk], top, total))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _log_total(logits_MV: Tensor, top_M: Tensor, total_M: Tensor) -> Tensor:
    """Return [M] from the largest and the exact sum of softmax's weights: their common factor is as
    wrong as the sum that softmax took, and the exact sum says how much.
    """
    return logits_MV.amax(dim=-1).double() + (total_M / top_M.double()).log()


def _draw_and_total(logits_MV: Tensor, uniforms_M: FloatRows) -> tuple[Tensor, Tensor]:
    """Return :func:`draw` of plain rows and :func:`log_totals`, from one softmax.

    Rows beyond the numbers given are drawn as well, for nobody.
    """
    numbers = np.zeros(len(logits_MV))
    numbers[: len(uniforms_M)] = uniforms_M
    drawn: list[Tensor] = []
    totals: list[Tensor] = []
    for chunk in _chunks(logits_MV):
        weights_MV = torch.softmax(logits_MV[chunk], dim=-1)
        top = weights_MV.amax(dim=-1)
        tokens, total = _inverse_cdf(weights_MV, numbers[chunk])
        drawn.append(tokens)
        totals.append(_log_total(logits_MV[chunk], top, total))
    return (drawn[0], totals[0]) if len(drawn) == 1 else (torch.cat(drawn), torch.cat(totals))


def draw(scores_MV: Tensor, rows: SamplingRows) -> Tensor:
    """Return [M] int64: one token per row.

    Args:
        scores_MV: [M, V] fp32 logits or log-probs; not modified.
    """
    is_greedy = rows.temperature == 0.0
    if is_greedy.all():
        return scores_MV.argmax(dim=-1)
    if not is_greedy.any():
        return _sample(scores_MV, rows)
    tokens_M = torch.empty(len(scores_MV), dtype=torch.int64, device=scores_MV.device)
    for members in (np.flatnonzero(is_greedy), np.flatnonzero(~is_greedy)):
        index = torch.from_numpy(members).to(scores_MV.device)
        tokens_M[index] = draw(scores_MV[index], rows.take(members))
    return tokens_M


def _sample(scores_MV: Tensor, rows: SamplingRows) -> Tensor:
    """Draw rows of which none is greedy."""
    parts = [
        _inverse_cdf(_weights(scores_MV[chunk], rows.take(chunk)), rows.uniforms[chunk])[0]
        for chunk in _chunks(scores_MV)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _chunks(scores_MV: Tensor) -> list[slice]:
    """Return the rows to work on together, on a CPU as many as fit its cache; never nothing."""
    num_rows, num_tokens = scores_MV.shape
    step = max(1, num_rows if scores_MV.is_cuda else _CHUNK // num_tokens)
    return [slice(start, start + step) for start in range(0, max(1, num_rows), step)]


def _weights(scores_MV: Tensor, rows: SamplingRows) -> Tensor:
    """Return [M, V] fp32 weights, zero where filtered; their sum is at most about 1."""
    temperature, top_k, top_p, min_p = rows.shape.T
    if (temperature != 1.0).any():
        # The distance from the top, so that no small temperature overflows.
        scores_MV = scores_MV - scores_MV.amax(dim=-1, keepdim=True)
        scores_MV /= _column(temperature, scores_MV)
    weights_MV = torch.softmax(scores_MV, dim=-1)
    _filter(weights_MV, (top_k > 0) & (top_k < weights_MV.shape[-1]), top_k, _kth)
    _filter(weights_MV, top_p < 1.0, top_p, _nucleus)
    _filter(weights_MV, min_p > 0.0, min_p, _share_of_top)
    return weights_MV


def _column(values: FloatRows, like: Tensor) -> Tensor:
    """Return [M, 1] with the dtype and device of ``like``."""
    return torch.from_numpy(values).to(like)[:, None]


# Filters: the least weight that each row keeps


def _filter(
    weights_MV: Tensor,
    asked_M: npt.NDArray[np.bool_],
    limits_M: FloatRows,
    least: Callable[[Tensor, FloatRows], Tensor],
) -> None:
    """Zero, in the rows that ask for it, every weight below ``least(their weights, limits)``."""
    if not asked_M.any():
        return
    part, limits = weights_MV, limits_M[asked_M]
    index = torch.from_numpy(np.flatnonzero(asked_M)).to(weights_MV.device)
    if len(index) < len(weights_MV):
        part = weights_MV[index]
    part.masked_fill_(part < least(part, limits), 0.0)
    if part is not weights_MV:
        weights_MV[index] = part


def _kth(weights_MV: Tensor, top_k_M: FloatRows) -> Tensor:
    """Return [M, 1]: the weight of the ``top_k``-th likeliest token."""
    likeliest = weights_MV.topk(int(top_k_M.max()), dim=-1).values
    return likeliest.gather(-1, _column(top_k_M, likeliest).long() - 1)


def _nucleus(weights_MV: Tensor, top_p_M: FloatRows) -> Tensor:
    """Return [M, 1]: the last weight needed for the likeliest tokens to reach ``top_p`` of all."""
    total = _rounded(weights_MV.clone()).sum(dim=-1, keepdim=True, dtype=torch.float64)
    return _last_needed(weights_MV, _column(top_p_M, total) * total, _FIRST_LOOK)


def _last_needed(weights_MV: Tensor, wanted: Tensor, num_looked: int) -> Tensor:
    """Return [M, 1]: the weight with which the sum in falling order reaches ``wanted`` [M, 1].

    Looks at the ``num_looked`` likeliest tokens, and further only in rows where they do not do.
    """
    num_looked = min(num_looked, weights_MV.shape[-1])
    likeliest = weights_MV.topk(num_looked, dim=-1).values
    reached = _rounded(likeliest.clone()).cumsum(dim=-1, dtype=torch.float64)
    last = (reached < wanted).sum(dim=-1, keepdim=True).clamp_(max=num_looked - 1)
    found = likeliest.gather(-1, last)
    short = (reached[:, -1:] < wanted)[:, 0]
    if num_looked < weights_MV.shape[-1] and bool(short.any()):
        found[short] = _last_needed(weights_MV[short], wanted[short], 8 * num_looked)
    return found


def _share_of_top(weights_MV: Tensor, min_p_M: FloatRows) -> Tensor:
    """Return [M, 1]: ``min_p`` of the likeliest token's weight."""
    return weights_MV.amax(dim=-1, keepdim=True) * _column(min_p_M, weights_MV)


# The CDF


def _rounded(weights: Tensor) -> Tensor:
    """Round to multiples of 2^-52, in place, each by less than the spacing of fp32 there."""
    return weights.add_(_ROUNDING).sub_(_ROUNDING)


def _first_beyond(ends: Tensor, point: Tensor) -> Tensor:
    """Return [M, 1]: the first index whose cumulative weight exceeds ``point``; never outside, even
    where all is NaN.
    """
    return torch.searchsorted(ends, point, right=True).clamp_(max=ends.shape[-1] - 1)


def _inverse_cdf(weights_MV: Tensor, uniforms_M: FloatRows) -> tuple[Tensor, Tensor]:
    """Return [M] the first token whose cumulative weight exceeds ``uniform * total``, whose own
    weight is never zero, and [M] float64 the exact totals. Rounds the weights in place.
    """
    num_rows, num_tokens = weights_MV.shape
    exact, blocks = _rounded(weights_MV), None
    if num_tokens <= _FLAT:
        ends = exact.cumsum(dim=-1, dtype=torch.float64)
    else:
        if num_tokens % _BLOCK:
            exact = pad(exact, (0, -num_tokens % _BLOCK))
        blocks = exact.view(num_rows, -1, _BLOCK)
        ends = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    # At 1 - 2^-53 the product could round up to the total, which selects a token of no weight.
    point = ends[:, -1:] * _column(np.minimum(uniforms_M, 1.0 - 2.0**-52), ends)
    found = _first_beyond(ends, point)
    if blocks is None:
        return found[:, 0], ends[:, -1]
    before = torch.where(found > 0, ends.gather(-1, (found - 1).clamp_(min=0)), 0.0)
    inside = blocks.gather(1, found[:, :, None].expand(-1, 1, _BLOCK))[:, 0]
    token = _first_beyond(inside.cumsum(dim=-1, dtype=torch.float64), point - before)
    return (found * _BLOCK + token)[:, 0].clamp_(max=num_tokens - 1), ends[:, -1]
