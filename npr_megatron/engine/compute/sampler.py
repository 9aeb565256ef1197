"""Scores to tokens, a whole batch at a time, by inverse CDF in float64.

The draw is a pure function of a row's scores and one uniform number, and the number is a pure
function of (request seed, block, branch, index) (``records.randomness``). So which requests happen
to share a step does not change a sample. Whatever shapes the draw, the recorded log-probs are of
the full distribution at temperature 1, which is the policy the trainer differentiates.

Order: penalties (``penalties``), temperature, top-k, top-p, min-p (``filters``), draw (``cdf``).
Rows at the defaults pay for none but the last, which on a CPU is one loop (``host_draw``).
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
from npr_megatron.engine.compute.host_draw import draw_and_total, draw_next
from npr_megatron.engine.compute.penalties import penalised
from npr_megatron.engine.flow.flow import Stream
from npr_megatron.records.randomness import UInt64Array, uniforms

_PLAIN = (1.0, 0.0, 1.0, 0.0)
"""temperature, top-k, top-p and min-p that shape nothing."""


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
        return cls(np.array(shape, dtype=np.float64), uniforms(*_keys_and_counters(streams)))

    @property
    def is_plain(self) -> bool:
        """Whether every row is drawn from its full distribution at temperature 1."""
        return bool((self.shape == _PLAIN).all())

    @property
    def temperature(self) -> FloatRows:
        """[M] 0.0 is greedy."""
        return self.shape[:, 0]

    def take(self, rows: npt.NDArray[np.intp] | slice) -> SamplingRows:
        """Return the given rows only."""
        return SamplingRows(self.shape[rows], self.uniforms[rows])


def choose(
    logits_MV: Tensor, streams: Sequence[Stream], known: Sequence[int] = ()
) -> tuple[list[int], list[float]]:
    """Return one token per stream, and the log-prob of every row's token.

    Tokens are sampled under the stream's request, or its teacher's.

    Args:
        logits_MV: [M, V] fp32, row i of ``streams[i]``, then of ``known``. Not modified. A row of
            NaN gives some token and disturbs no other.
        known: tokens that the rows behind those of the streams predict.

    Returns:
        The tokens, and M log-probs under the full distribution: NaN where a row is none.
    """
    is_plain = all(stream.flow.draws_from_policy for stream in streams)
    if is_plain and logits_MV.device.type == "cpu":
        found = draw_next(
            logits_MV.numpy(), *_keys_and_counters(streams), np.array(known, np.int64)
        )
        drawn, totals_M = found.tokens.tolist(), torch.from_numpy(found.totals)
        if all(stream.flow.teacher is None for stream in streams):
            return drawn, found.logprobs.tolist()
    elif is_plain:
        drawn_M, totals_M = draw_plain(logits_MV, uniforms(*_keys_and_counters(streams)))
        drawn = drawn_M.tolist()
    else:
        scores_MV = penalised(logits_MV[: len(streams)], streams)
        drawn, totals_M = draw(scores_MV, SamplingRows.of(streams)).tolist(), log_totals(logits_MV)
    tokens = [_taught(stream, token) for stream, token in zip(streams, drawn, strict=True)]
    return tokens, _logprobs(logits_MV, np.array([*tokens, *known], np.int64), totals_M)


def _logprobs(logits_MV: Tensor, labels_M: npt.NDArray[np.int64], totals_M: Tensor) -> list[float]:
    """Return the log-prob of each row's label."""
    labels = torch.from_numpy(labels_M).to(logits_MV.device)
    return (logits_MV.gather(-1, labels[:, None])[:, 0] - totals_M).tolist()


def _taught(stream: Stream, token_id: int) -> int:
    """Return what the stream's teacher takes instead of ``token_id``, if it has one that does."""
    teacher = stream.flow.teacher
    if teacher is None:
        return token_id
    taught = teacher(stream.segment.block, stream.segment.branch, stream.index)
    return token_id if taught is None else taught


def _keys_and_counters(streams: Sequence[Stream]) -> tuple[UInt64Array, UInt64Array]:
    """Return [M] key and counter of each stream's number for its next token."""
    return (
        np.array([stream.key for stream in streams], dtype=np.uint64),
        np.array([stream.index for stream in streams], dtype=np.uint64),
    )


def draw_plain(logits_MV: Tensor, uniforms_M: FloatRows) -> tuple[Tensor, Tensor]:
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


def draw_with_totals(logits_MV: Tensor, rows: SamplingRows) -> tuple[Tensor, Tensor]:
    """Return [M] int64 tokens and [M] float64 log-sum-exp, on the device of the logits.

    Args:
        logits_MV: [M, V] fp32; not modified. A row of NaN gives some token, and NaN.
    """
    if not rows.is_plain:
        return draw(logits_MV, rows), log_totals(logits_MV)
    if logits_MV.device.type != "cpu":
        return draw_plain(logits_MV, rows.uniforms)
    tokens, totals = draw_and_total(logits_MV.numpy(), rows.uniforms)
    return torch.from_numpy(tokens), torch.from_numpy(totals)


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
