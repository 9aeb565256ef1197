"""Logits to tokens, a whole batch at a time, by inverse CDF in float64.

The draw is a pure function of the distribution and one uniform number per row, and the number is a
pure function of (request seed, block, branch, index) (``records.randomness``). So which requests
happen to share a step does not change a sample. Temperature and nucleus shape the draw only: the
recorded log-probs are of the full distribution at temperature 1, which is the policy the trainer
differentiates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SamplingRows:
    """How each of M rows is drawn, as aligned arrays."""

    temperature: npt.NDArray[np.float64]
    """[M] 0.0 is greedy."""
    top_p: npt.NDArray[np.float64]
    """[M] nucleus mass."""
    uniforms: npt.NDArray[np.float64]
    """[M] in [0, 1)."""


def policy_logprobs(logits_MV: Tensor) -> Tensor:
    """Return [M, V] fp32 natural-log probabilities at temperature 1."""
    return torch.log_softmax(logits_MV.float(), dim=-1)


def draw(logprobs_MV: Tensor, rows: SamplingRows) -> Tensor:
    """Return [M] int64: one token per row.

    Args:
        logprobs_MV: [M, V] fp32 from :func:`policy_logprobs`; not modified.
    """
    is_greedy = rows.temperature == 0.0
    if is_greedy.all():
        return logprobs_MV.argmax(dim=-1)
    probs_MV = _shaped_probs(logprobs_MV, rows)
    tokens_M = _inverse_cdf(probs_MV, torch.from_numpy(rows.uniforms).to(probs_MV.device))
    if is_greedy.any():
        greedy_M = torch.from_numpy(is_greedy).to(tokens_M.device)
        tokens_M = torch.where(greedy_M, logprobs_MV.argmax(dim=-1), tokens_M)
    return tokens_M


def _shaped_probs(logprobs_MV: Tensor, rows: SamplingRows) -> Tensor:
    """Return [M, V] float64 weights (not normalised) after temperature and nucleus."""
    shaped_MV = logprobs_MV.double()
    if (rows.temperature != 1.0).any():
        temperature = np.where(rows.temperature == 0.0, 1.0, rows.temperature)
        shaped_MV = shaped_MV / torch.from_numpy(temperature).to(shaped_MV.device)[:, None]
        shaped_MV = shaped_MV - shaped_MV.amax(dim=-1, keepdim=True)
    probs_MV = shaped_MV.exp()
    if (rows.top_p < 1.0).any():
        probs_MV = _nucleus(probs_MV, torch.from_numpy(rows.top_p).to(probs_MV.device))
    return probs_MV


def _nucleus(probs_MV: Tensor, top_p_M: Tensor) -> Tensor:
    """Zero everything outside the smallest set of likeliest tokens whose mass reaches ``top_p``."""
    sorted_MV, order_MV = probs_MV.sort(dim=-1, descending=True, stable=True)
    mass_before_MV = sorted_MV.cumsum(dim=-1) - sorted_MV
    is_kept_MV = mass_before_MV < (top_p_M * probs_MV.sum(dim=-1))[:, None]
    is_kept_MV |= (top_p_M >= 1.0)[:, None]  # rounding must not trim a full distribution
    is_kept_MV[:, 0] = True
    return torch.zeros_like(probs_MV).scatter_(-1, order_MV, sorted_MV * is_kept_MV)


def _inverse_cdf(probs_MV: Tensor, uniforms_M: Tensor) -> Tensor:
    """Return the first token whose cumulative mass exceeds ``uniform * total``; its own mass is
    never zero.
    """
    cumulative_MV = probs_MV.cumsum(dim=-1)
    total_M = cumulative_MV[:, -1]
    # Rounding up to the total would select a token of no mass.
    mass_M = torch.minimum(
        uniforms_M * total_M, torch.nextafter(total_M, torch.zeros_like(total_M))
    )
    return torch.searchsorted(cumulative_MV, mass_M[:, None], right=True)[:, 0]
