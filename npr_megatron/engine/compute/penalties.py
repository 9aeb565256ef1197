"""Repetition penalties: scores of tokens that a stream has seen already, made smaller.

The rule is that of the CTRL paper (arXiv 1909.05858, section 4.1) as every engine has it: a
positive score is divided by the penalty, a negative one multiplied. It acts on logits, as in
Transformers, vLLM and SGLang, and cannot act on log-probs: a token of probability 0.99 has one of
-0.01, which no penalty moves, and a loop is made of such tokens.

Two penalties, each counted once per token however often it was seen:

    repetition_penalty       over all that the stream sees: prompt, trunk, joined branches, and in a
                             branch its own tokens, never a sibling's
    step_repetition_penalty  in a branch only, over its own tokens without the header the engine
                             wrote

A token under both has its score divided or multiplied by both. Segments keep their distinct tokens
as they grow (``flow.segment``), so a stream's next token costs no look at those before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npr_megatron.engine.flow.flow import Stream


@dataclass(frozen=True, slots=True, eq=False)
class Penalised:
    """N scores to make smaller, as aligned arrays. Equal pairs (row, token) have equal factors."""

    rows: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int64]
    factors: npt.NDArray[np.float32]

    def apply(self, scores_MV: Tensor) -> None:
        """Change ``scores_MV`` in place."""
        device = scores_MV.device
        rows = torch.from_numpy(self.rows).to(device)
        token_ids = torch.from_numpy(self.token_ids).to(device)
        factors = torch.from_numpy(self.factors).to(device)
        scores = scores_MV[rows, token_ids]
        scores_MV[rows, token_ids] = torch.where(scores < 0, scores * factors, scores / factors)


def penalised(scores_MV: Tensor, streams: Sequence[Stream]) -> Tensor:
    """Return [M, V] with the penalties of ``streams`` applied: the argument itself where none asks
    for any, else a changed copy.

    Args:
        scores_MV: [M, V] fp32 logits, row i of ``streams[i]``.
    """
    seen = _gather(
        (row, stream.flow.request.repetition_penalty, _seen_by(stream))
        for row, stream in enumerate(streams)
        if stream.flow.request.repetition_penalty != 1.0
    )
    said = _gather(
        (row, stream.flow.request.step_repetition_penalty, _said_by(stream))
        for row, stream in enumerate(streams)
        if stream.flow.request.step_repetition_penalty != 1.0 and stream.segment.branch
    )
    if seen is None and said is None:
        return scores_MV
    scores_MV = scores_MV.clone()
    for entries in (seen, said):
        if entries is not None:
            entries.apply(scores_MV)
    return scores_MV


def _seen_by(stream: Stream) -> npt.NDArray[np.int64]:
    """Return every token that ``stream`` sees, some of them more than once."""
    flow = stream.flow
    siblings = {id(other.segment) for other in flow.branches if other is not stream}
    visible = [segment for segment in flow.segments if id(segment) not in siblings]
    return np.concatenate([segment.distinct().ids for segment in visible])


def _said_by(stream: Stream) -> npt.NDArray[np.int64]:
    """Return the tokens that the model chose in this branch."""
    distinct = stream.segment.distinct()
    return distinct.ids[distinct.is_sampled]


def _gather(
    found: Iterable[tuple[int, float, npt.NDArray[np.int64]]],
) -> Penalised | None:
    """Return the entries of all (row, penalty, tokens); None if there are no rows."""
    parts = list(found)
    if not parts:
        return None
    rows, factors, token_ids = zip(*parts, strict=True)
    lengths = [len(ids) for ids in token_ids]
    return Penalised(
        rows=np.repeat(np.array(rows, np.int64), lengths),
        token_ids=np.concatenate(token_ids),
        factors=np.repeat(np.array(factors, np.float32), lengths),
    )
