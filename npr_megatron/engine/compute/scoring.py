"""Log-probs of finished trajectories by one masked pass: no pool, no decoding.

The second way to the same numbers: decoding walks the tree token by token through the KV pool,
scoring lays it flat under the visibility rule. Agreement of the two is the engine's own parity
check.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from npr_megatron.engine.compute.attention import DenseAttention
from npr_megatron.engine.compute.cdf import log_totals
from npr_megatron.engine.compute.model import EngineModel
from npr_megatron.records.trajectory import FloatArray, Trajectory
from npr_megatron.topology.layout import predecessors
from npr_megatron.topology.visibility import dense_mask

_MASK_ELEMENTS = 1 << 24
"""Most mask entries per pass: bounds memory, not results."""
_LOGIT_ELEMENTS = 1 << 24
"""Most logits held at once."""


def score(model: EngineModel, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
    """Return, per trajectory, [T] log-probs given its recorded positions and branches.

    0.0 on the prompt and where nothing predicts a token, as in the record.
    """
    results: list[FloatArray] = [np.zeros(0, dtype=np.float32)] * len(trajectories)
    for indices in _chunks([len(trajectory.token_ids) for trajectory in trajectories]):
        chunk = [trajectories[index] for index in indices]
        for index, logprobs in zip(indices, _score_rows(model, chunk), strict=True):
            results[index] = logprobs
    return results


def _chunks(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield indices in order of length, as many together as the mask may hold."""
    chunk: list[int] = []
    for index in np.argsort(lengths, kind="stable").tolist():
        if chunk and (len(chunk) + 1) * lengths[index] ** 2 > _MASK_ELEMENTS:
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


def _score_rows(model: EngineModel, rows: Sequence[Trajectory]) -> list[FloatArray]:
    length = max(len(row.token_ids) for row in rows)
    streams = np.zeros((4, len(rows), length), dtype=np.int32)
    segment = np.full((len(rows), length), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        num_tokens = len(row.token_ids)
        streams[:, index, :num_tokens] = row.token_ids, row.position_ids, row.block, row.branch
        segment[index, :num_tokens] = 0
    token_ids, position_ids, block, branch = torch.from_numpy(streams).to(model.device).long()
    mask = dense_mask(torch.from_numpy(segment).to(model.device), block, branch)
    attend = DenseAttention(mask[:, None], model.num_kv)
    hidden = model.hidden(token_ids.view(-1), position_ids.view(-1), attend)
    results: list[FloatArray] = []
    for index, row in enumerate(rows):
        sources = predecessors(row.block, row.branch)
        sources[: row.prompt_length] = -1
        targets = np.flatnonzero(sources >= 0)
        logprobs = np.zeros(len(row.token_ids), dtype=np.float32)
        logprobs[targets] = _label_logprobs(
            model,
            hidden[torch.from_numpy(sources[targets] + index * length).to(model.device)],
            torch.from_numpy(row.token_ids[targets]).to(model.device).long(),
        )
        results.append(logprobs)
    return results


def _label_logprobs(model: EngineModel, hidden: Tensor, labels: Tensor) -> FloatArray:
    """Return [M] log-probs of [M] labels, holding few logits at a time."""
    rows = max(1, _LOGIT_ELEMENTS // model.config.vocab_size)
    pieces: list[Tensor] = []
    for part, label in zip(hidden.split(rows), labels.split(rows), strict=True):
        logits_MV = model.logits(part)
        pieces.append(logits_MV.gather(-1, label[:, None])[:, 0] - log_totals(logits_MV))
    return torch.cat(pieces).float().cpu().numpy()
