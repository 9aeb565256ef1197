"""Rows of embedding and head that are no token's: they make shards even, and learn nothing.

No token id reaches them in the embedding, and ``model.logprobs`` computes no logit of them in the
head, so they are never predicted and get no gradient. They are zero from the start, so neither
momentum nor weight decay moves them. What is exported or published does not contain them: no tile
of ``weights.layouts`` does.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed import ProcessGroup


def num_own_tokens(num_rows: int, vocab_size: int, tp_group: ProcessGroup) -> int:
    """Return how many of this rank's ``num_rows`` rows are tokens; padding stands behind them."""
    return min(max(vocab_size - tp_group.rank() * num_rows, 0), num_rows)


@torch.no_grad()
def clear_padding(chunk: GPTModel, vocab_size: int) -> None:
    """Set the padding of embedding and head to zero, where ``chunk`` has them."""
    weights: list[Tensor | None] = []
    if chunk.pre_process:
        weights.append(chunk.embedding.word_embeddings.weight)
    if chunk.post_process:
        weights.append(chunk.output_layer.weight)  # None where it is the embedding's
    tp_group: Any = chunk.tp_group
    for weight in weights:
        if weight is not None:
            weight[num_own_tokens(len(weight), vocab_size, tp_group) :] = 0
