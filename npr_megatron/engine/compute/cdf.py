"""Sums over a vocabulary that are exact in any order, and what is read off them: draws, log-probs.

Rows that are drawn as the weights say, and all totals, take ``host_draw``'s loop on a CPU instead:
its sums differ from these by rounding, less than 1e-7 of a log-prob.

Weights are fp32 probabilities rounded to multiples of 2^-52, and sums of such numbers below 2 are
exact in float64. So a sum depends neither on the rows that share the batch, nor on threads, nor on
the device, and the CDF can be searched in two levels, blocks first, without changing a draw.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from npr_megatron.engine.compute.host_draw import draw_and_total

_FLAT = 2048
"""Largest vocabulary whose CDF is searched in one level."""
_BLOCK = 128
"""Tokens per block where there are two levels."""
_CHUNK = 1 << 18
"""Weights that a CPU works on at once: 1 MiB stays in its cache."""
_ROUNDING = 2.0**-29
"""fp32 numbers of [2^-29, 2^-28) are spaced 2^-52: adding and subtracting it rounds to that."""

FloatRows = npt.NDArray[np.float64]


def log_totals(logits_MV: Tensor) -> Tensor:
    """Return [M] float64 log-sum-exp: logits minus these are the policy's log-probs. NaN where a
    row is no distribution.

    Good to 1e-7 whatever the size of logits and vocabulary; ``logsumexp`` in fp32 errs by 4e-6 and
    ``log_softmax`` by 9e-6 over 151,936 tokens, as much as trainer and engine may differ.
    """
    if logits_MV.device.type == "cpu":
        return torch.from_numpy(draw_and_total(logits_MV.numpy(), np.zeros(len(logits_MV)))[1])
    return log_totals_in_torch(logits_MV)


def log_totals_in_torch(logits_MV: Tensor) -> Tensor:
    """Do the same on any device."""
    parts: list[Tensor] = []
    for chunk in chunks(logits_MV):
        weights_MV = torch.softmax(logits_MV[chunk], dim=-1)
        top = weights_MV.amax(dim=-1)
        total = rounded(weights_MV).sum(dim=-1, dtype=torch.float64)
        parts.append(log_total(logits_MV[chunk], top, total))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def log_total(logits_MV: Tensor, top_M: Tensor, total_M: Tensor) -> Tensor:
    """Return [M] from the largest and the exact sum of softmax's weights: their common factor is as
    wrong as the sum that softmax took, and the exact sum says how much.
    """
    return logits_MV.amax(dim=-1) + (total_M / top_M).log()  # in float64, as the total is


def rounded(weights: Tensor) -> Tensor:
    """Round to multiples of 2^-52, in place, each by less than the spacing of fp32 there."""
    return weights.add_(_ROUNDING).sub_(_ROUNDING)


def _first_beyond(ends: Tensor, point: Tensor) -> Tensor:
    """Return [M, 1]: the first index whose cumulative weight exceeds ``point``; never outside, even
    where all is NaN.
    """
    return torch.searchsorted(ends, point, right=True).clamp_(max=ends.shape[-1] - 1)


def inverse_cdf(weights_MV: Tensor, uniforms_M: FloatRows) -> tuple[Tensor, Tensor]:
    """Return [M] the first token whose cumulative weight exceeds ``uniform * total``, whose own
    weight is never zero, and [M] float64 the exact totals. Rounds the weights in place.
    """
    num_rows, num_tokens = weights_MV.shape
    exact, blocks = rounded(weights_MV), None
    if num_tokens <= _FLAT:
        ends = exact.cumsum(dim=-1, dtype=torch.float64)
    else:
        if num_tokens % _BLOCK:
            exact = pad(exact, (0, -num_tokens % _BLOCK))
        blocks = exact.view(num_rows, -1, _BLOCK)
        ends = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    # Never the total itself: times 1 - 2^-53, the largest number below 1, every float64 gets less.
    point = ends[:, -1:] * column(uniforms_M, ends)
    found = _first_beyond(ends, point)
    if blocks is None:
        return found[:, 0], ends[:, -1]
    before = torch.where(found > 0, ends.gather(-1, (found - 1).clamp_(min=0)), 0.0)
    inside = blocks.gather(1, found[:, :, None].expand(-1, 1, _BLOCK))[:, 0]
    token = _first_beyond(inside.cumsum(dim=-1, dtype=torch.float64), point - before)
    return (found * _BLOCK + token)[:, 0].clamp_(max=num_tokens - 1), ends[:, -1]


def chunks(scores_MV: Tensor) -> list[slice]:
    """Return the rows to work on together, on a CPU as many as fit its cache; never nothing."""
    num_rows, num_tokens = scores_MV.shape
    step = max(1, num_rows if scores_MV.is_cuda else _CHUNK // num_tokens)
    return [slice(start, start + step) for start in range(0, max(1, num_rows), step)]


def column(values: FloatRows, like: Tensor) -> Tensor:
    """Return [M, 1] with the dtype and device of ``like``; waits for nothing that runs there."""
    return torch.from_numpy(values).to(like, non_blocking=True)[:, None]
