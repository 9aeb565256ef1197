"""Megatron's GPTModel, made to answer with label log-probs.

Positions and visibility enter through ``packed_seq_params`` (see ``model.attention``). The last
pipeline stage returns log-probs of labels instead of Megatron's cross-entropy loss, so that SFT,
DAPO and PAPO differ only in what the trainer does with them; logits are never whole, see
``model.logprobs``.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.model.attention import branch_context
from npr_megatron.model.experts import multiply_in_torch, reduce_experts_apart
from npr_megatron.model.logprobs import LabelHead
from npr_megatron.model.route_replay import RouteReplay
from npr_megatron.model.vocab_padding import clear_padding
from npr_megatron.records.sample import PackedBatch
from npr_megatron.runtime.device import current_device


class BranchGPT(GPTModel):
    """One pipeline stage of the NPR GPT."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        config: TransformerConfig,
        **keywords: Any,
    ) -> None:
        super().__init__(
            config=config,
            vocab_size=parallel.padded_vocab_size(model.vocab_size),
            max_sequence_length=model.max_position_embeddings,
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            position_embedding_type="none",
            **keywords,
        )
        clear_padding(self, model.vocab_size)
        multiply_in_torch()
        reduce_experts_apart(self)
        if self.post_process:
            LabelHead.take_over(self.output_layer, model.vocab_size)
        self._route_replay: RouteReplay | None = None
        if model.moe is not None:
            tp: Any = self.tp_group
            share = (tp.rank(), tp.size()) if config.sequence_parallel else (0, 1)
            self._route_replay = RouteReplay(self, model.moe.num_dense_layers, share)

    def forward(
        self, *inputs: Any, routed_experts: Tensor | None = None, **keywords: Any
    ) -> Tensor:
        """Run Megatron's forward pass.

        Args:
            routed_experts: [S, B, M, K] experts to compute each token with, -1 where the router is
                free; None where all routers are.
        """
        if self._route_replay is not None:
            self._route_replay.begin(routed_experts)
        return super().forward(*inputs, **keywords)

    def _postprocess(self, hidden_states: Tensor, labels: Tensor, **_: Any) -> Any:
        """Return label log-probs and entropies, [B, S] each, on the last stage; Megatron calls it
        with what the layers of a stage return."""
        if not self.post_process:
            return hidden_states
        is_tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if is_tied else None
        scores = self.output_layer(hidden_states, weight, labels.t())
        return tuple(score.t().contiguous() for score in scores)


def stage_inputs(
    batch: PackedBatch,
    own: PackedBatch,
    model: ModelConfig,
    dtype: torch.dtype,
    cp_group: ProcessGroup,
) -> dict[str, Any]:
    """Return the keyword arguments of a forward pass over ``own``, on this rank's device.

    The output of that pass is fp32 log-probs of ``own.labels`` and the entropies there, of its
    shape, on the last stage, and hidden states for the next stage elsewhere.

    Args:
        own: the tokens of ``batch`` that this rank holds among ``cp_group``.
    """
    device = current_device()
    routes = None
    if own.routed_experts is not None:
        routes = torch.from_numpy(own.routed_experts).to(device).transpose(0, 1)
    return {
        "routed_experts": routes,
        "input_ids": torch.from_numpy(own.token_ids).to(device, torch.int64),
        "position_ids": None,  # already in the context, as angles
        "attention_mask": None,
        "labels": torch.from_numpy(own.labels).to(torch.int64),  # on the CPU, see label_scores
        "packed_seq_params": branch_context(batch, own, model, dtype, device, cp_group),
    }
