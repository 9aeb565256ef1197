"""Megatron's GPTModel, made to answer with label log-probs.

Positions and visibility enter through ``packed_seq_params`` (see ``model.attention``). With
``labels`` the last pipeline stage returns log-probs instead of Megatron's cross-entropy loss, so
that SFT, DAPO and PAPO differ only in what the trainer does with them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from npr_megatron.config.model import ModelConfig
from npr_megatron.model.attention import branch_context
from npr_megatron.model.logprobs import label_logprobs
from npr_megatron.records.sample import PackedBatch
from npr_megatron.runtime.device import current_device


class BranchGPT(GPTModel):
    """One pipeline stage of the NPR GPT."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, **keywords: Any) -> None:
        super().__init__(
            config=config,
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            position_embedding_type="none",
            **keywords,
        )

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return label log-probs [B, S]; Megatron calls this on the last stage."""
        return label_logprobs(logits, labels.t().contiguous()).t().contiguous()


def stage_inputs(
    batch: PackedBatch,
    own: PackedBatch,
    model: ModelConfig,
    dtype: torch.dtype,
    cp_group: ProcessGroup,
) -> dict[str, Any]:
    """Return the keyword arguments of a forward pass over ``own``, on this rank's device.

    The output of that pass is fp32 log-probs of ``own.labels``, of its shape, on the last stage,
    and hidden states for the next stage elsewhere.

    Args:
        own: the tokens of ``batch`` that this rank holds among ``cp_group``.
    """
    device = current_device()
    return {
        "input_ids": torch.from_numpy(own.token_ids).to(device, torch.int64),
        "position_ids": None,  # already in the context, as angles
        "attention_mask": None,
        "labels": torch.from_numpy(own.labels).to(device, torch.int64),
        "packed_seq_params": branch_context(batch, own, model, dtype, device, cp_group),
    }
