"""What the trainer learns from: one sample, and rows of samples packed for one microbatch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from npr_megatron.records.trajectory import BoolArray, FloatArray, IntArray, RouteArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingSample:
    """One trajectory with its place in the tree and its share in the loss.

    ``predecessor[t]`` is the index of the token whose logits predict token ``t`` (labels follow the
    tree, not the flattened text); -1 where nothing predicts it: the first prompt token, the first
    token of branches 2.., and the first token after a join. No index occurs twice.
    """

    token_ids: IntArray
    """[T]"""
    position_ids: IntArray
    """[T]"""
    block: IntArray
    """[T]"""
    branch: IntArray
    """[T]"""
    predecessor: IntArray
    """[T]"""
    loss_mask: BoolArray
    """[T] True where the token is learnt; False wherever ``predecessor`` is -1."""
    advantage: float = 0.0
    """Scales the policy gradient of every learnt token; unused by SFT."""
    rollout_logprobs: FloatArray | None = None
    """[T] log-probs recorded by the engine; None for SFT."""
    routed_experts: RouteArray | None = None
    """[T, M, K] recorded by the engine, see ``Trajectory``; None: the trainer routes freely."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch:
    """One microbatch: B rows of S tokens; a row holds whole samples one after another, then pads.

    Streams are [B, S]. ``segment`` tells samples of a row apart (0, 1, ...; -1 is padding); a token
    sees only its own segment. ``labels[b, s]`` is the id predicted *by the logits at* s, -1 where
    nothing is learnt. The last three streams are aligned with the logit that predicts.
    """

    token_ids: IntArray
    position_ids: IntArray
    segment: IntArray
    block: IntArray
    branch: IntArray
    labels: IntArray
    """int32; -1 = no loss at this logit."""
    advantages: FloatArray
    """0.0 where ``labels`` is -1."""
    rollout_logprobs: FloatArray
    """0.0 where ``labels`` is -1 or where none was recorded."""
    routed_experts: RouteArray | None = None
    """[B, S, M, K] experts to compute each token with; -1 where the router is free, None where it
    is free everywhere."""

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        rows, length = self.token_ids.shape
        return rows, length

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return int(np.count_nonzero(self.labels >= 0))

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(np.count_nonzero(self.segment >= 0))

    def take(self, columns: IntArray) -> PackedBatch:
        """Return the tokens at offsets ``columns`` of every row."""
        taken: dict[str, Any] = {}
        for field in fields(self):
            stream = getattr(self, field.name)
            taken[field.name] = None if stream is None else stream[:, columns]
        return PackedBatch(**taken)
