"""What Megatron must be told about routed experts: how routers multiply, who shares gradients."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer


def multiply_in_torch() -> None:
    """Let routers multiply by torch where there is no TransformerEngine; nothing where there is.

    They look for TransformerEngine's product under a name that Megatron then leaves undefined.
    """
    names: Any = moe_utils
    names.te_general_gemm = vars(names).get("te_general_gemm")


def reduce_experts_apart(chunk: GPTModel) -> None:
    """Have gradients and optimizer state of experts shared by the replicas of the *expert*.

    Megatron does so by itself under expert parallelism only. Without, it takes experts for a part
    of their layer, whose replicas are others wherever etp differs from tp, and sums gradients of
    different experts, or of too few tokens. Told so for every layout, it also writes checkpoints
    of one structure. Call it before the chunk is wrapped for training.
    """
    for layer in chunk.modules():
        if isinstance(layer, MoELayer):
            for parameter in layer.experts.parameters():
                marks: Any = parameter
                marks.allreduce = False
                # Their norm counts on every tensor-parallel rank: each has other experts, or other
                # rows of one, or after the reduction another share of them.
                marks.tensor_model_parallel = True
