"""Scores to tokens, a whole batch at a time, by inverse CDF in float64.

The draw is a pure function of a row's scores and one uniform number, and the number is a pure
function of (request seed, block, branch, index) (``records.randomness``). So which requests happen
to share a step does not change a sample. Whatever shapes the draw, the recorded log-probs are of
the full distribution at temperature 1, which is the policy the trainer differentiates.

Order: penalties (``penalties``), temperature, top-k, top-p, min-p (``filters``), draw (``cdf``).
Rows at the defaults pay for none but the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npr_megatron.engine.compute.cdf import FloatRows, chunks, inverse_cdf, log_total, log_totals
from npr_megatron.engine.compute.filters import shaped_weights
from npr_megatron.engine.compute.penalties import penalised
from npr_megatron.engine.flow.flow import Stream
from npr_megatron.records.randomness import uniforms


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
        return cls(np.array(shape, dtype=np.float64), _next_numbers(streams))

    @property
    def temperature(self) -> FloatRows:
        """[M] 0.0 is greedy."""
        return self.shape[:, 0]

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
    if all(stream.flow.draws_from_policy for stream in streams):
        drawn_M, totals_M = _draw_and_total(logits_MV, _next_numbers(streams))
    else:
        scores_MV = penalised(logits_MV[: len(streams)], streams)
        drawn_M, totals_M = draw(scores_MV, SamplingRows.of(streams)), log_totals(logits_MV)
    tokens: list[int] = drawn_M.tolist()[: len(streams)]
    for row, stream in enumerate(streams):
        if stream.flow.teacher is not None:
            segment = stream.segment
            taught = stream.flow.teacher(segment.block, segment.branch, stream.index)
            tokens[row] = tokens[row] if taught is None else taught
    return tokens, totals_M


def _next_numbers(streams: Sequence[Stream]) -> FloatRows:
    """Return [M] each stream's number for its next token."""
    return uniforms(
        np.array([stream.key for stream in streams], dtype=np.uint64),
        np.array([stream.index for stream in streams], dtype=np.uint64),
    )


def _draw_and_total(logits_MV: Tensor, uniforms_M: FloatRows) -> tuple[Tensor, Tensor]:
    """Return :func:`draw` of plain rows and :func:`log_totals`, from one softmax.

    Rows beyond the numbers given are drawn as well, for nobody.
    """
    numbers = np.zeros(len(logits_MV))
    numbers[: len(uniforms_M)] = uniforms_M
    drawn: list[Tensor] = []
    totals: list[Tensor] = []
    for chunk in chunks(logits_MV):
        weights_MV = torch.softmax(logits_MV[chunk], dim=-1)
        top = weights_MV.amax(dim=-1)
        tokens, total = inverse_cdf(weights_MV, numbers[chunk])
        drawn.append(tokens)
        totals.append(log_total(logits_MV[chunk], top, total))
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
        inverse_cdf(shaped_weights(scores_MV[chunk], rows.shape[chunk]), rows.uniforms[chunk])[0]
        for chunk in chunks(scores_MV)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
