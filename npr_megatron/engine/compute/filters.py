"""What temperature, top-k, top-p and min-p leave of a distribution, row by row.

They apply in this order, each to what the one before left; the mass that top-p counts is of the
tokens that top-k left. This is the order of Transformers' ``generate``; vLLM applies min-p before
top-k and top-p, which differs only where min-p trims the mass that top-p counts.

Every filter keeps the likeliest tokens down to some weight, so it is one threshold per row, and
tokens of equal weight stay or go together. Rows that do not ask for a filter are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npr_megatron.engine.compute.cdf import FloatRows, column, rounded

_FIRST_LOOK = 64
"""Likeliest tokens that top-p looks at first; where they lack mass, eight times as many."""


def shaped_weights(scores_MV: Tensor, shape: FloatRows) -> Tensor:
    """Return [M, V] fp32 weights, zero where filtered; their sum is at most about 1.

    Args:
        scores_MV: [M, V] fp32 logits or log-probs; not modified.
        shape: [M, 4] temperature (above 0), top-k, top-p and min-p.
    """
    temperature, top_k, top_p, min_p = shape.T
    if (temperature != 1.0).any():
        # The distance from the top, so that no small temperature overflows.
        scores_MV = scores_MV - scores_MV.amax(dim=-1, keepdim=True)
        scores_MV /= column(temperature, scores_MV)
    weights_MV = torch.softmax(scores_MV, dim=-1)
    _filter(weights_MV, (top_k > 0) & (top_k < weights_MV.shape[-1]), top_k, _kth)
    _filter(weights_MV, top_p < 1.0, top_p, _nucleus)
    _filter(weights_MV, min_p > 0.0, min_p, _share_of_top)
    return weights_MV


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
    return likeliest.gather(-1, column(top_k_M, likeliest).long() - 1)


def _nucleus(weights_MV: Tensor, top_p_M: FloatRows) -> Tensor:
    """Return [M, 1]: the last weight needed for the likeliest tokens to reach ``top_p`` of all."""
    total = rounded(weights_MV.clone()).sum(dim=-1, keepdim=True, dtype=torch.float64)
    return _last_needed(weights_MV, column(top_p_M, total) * total, _FIRST_LOOK)


def _last_needed(weights_MV: Tensor, wanted: Tensor, num_looked: int) -> Tensor:
    """Return [M, 1]: the weight with which the sum in falling order reaches ``wanted`` [M, 1].

    Looks at the ``num_looked`` likeliest tokens, and further only in rows where they do not do.
    """
    num_looked = min(num_looked, weights_MV.shape[-1])
    likeliest = weights_MV.topk(num_looked, dim=-1).values
    reached = rounded(likeliest.clone()).cumsum(dim=-1, dtype=torch.float64)
    last = (reached < wanted).sum(dim=-1, keepdim=True).clamp_(max=num_looked - 1)
    found = likeliest.gather(-1, last)
    short = (reached[:, -1:] < wanted)[:, 0]
    if num_looked < weights_MV.shape[-1] and bool(short.any()):
        found[short] = _last_needed(weights_MV[short], wanted[short], 8 * num_looked)
    return found


def _share_of_top(weights_MV: Tensor, min_p_M: FloatRows) -> Tensor:
    """Return [M, 1]: ``min_p`` of the likeliest token's weight."""
    return weights_MV.amax(dim=-1, keepdim=True) * column(min_p_M, weights_MV)
