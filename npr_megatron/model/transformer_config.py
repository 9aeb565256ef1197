"""The one place that spells Megatron-core's TransformerConfig and DistributedDataParallelConfig.

Numbers come from ``config.model`` and ``config.training``; the rest is fixed here: no dropout, no
biases, no fusion that needs a CUDA extension, gradients averaged over the loss tokens of the whole
global batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig, TrainerConfig
from npr_megatron.model.fp8 import fp8_flags, fp8_gather_flags
from npr_megatron.runtime.fused_kernels import fused_kernels
from npr_megatron.weights.storages import DTYPES

_RECOMPUTE_FLAGS: dict[str, dict[str, Any]] = {
    "none": {},
    # Core attention keeps no more than it takes and gives, here as in every fused kernel, but for
    # the keys and values of other ranks; what fills the memory of a layer is its MLP.
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, trainer: TrainerConfig
) -> TransformerConfig:
    """Return Megatron's description of ``model`` laid out as ``parallel``.

    That the sizes divide is the business of ``weights.layouts.trainer_layout``.
    """
    dtype = DTYPES[trainer.dtype]
    return TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.intermediate_size,
        layernorm_epsilon=model.rms_norm_eps,
        normalization="RMSNorm",
        qk_layernorm=model.has_qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **_pipeline_flags(parallel),
        **_expert_flags(model, parallel),
        **fp8_flags(model, trainer),
        **_RECOMPUTE_FLAGS[trainer.recompute],
        tensor_model_parallel_size=parallel.tp_size,
        context_parallel_size=parallel.cp_size,
        sequence_parallel=parallel.tp_size > 1,
        # Sums over tokens are divided once, by the token count of the whole global batch. DDP reads
        # this flag when it is built: without it gradients come out divided by dp as well.
        calculate_per_token_loss=True,
        # Interleaved chunks on two stages send two messages between one pair of ranks at a time.
        # They match by order, and batching swaps them: Megatron then trains on wrong activations
        # and says nothing.
        batch_p2p_comm=False,
        # Weights are always loaded after building. Initialisation stays on because it also marks
        # which parameters are sharded (clipping and checkpoints read the mark), but draws nothing.
        init_method=_leave_unset,
        output_layer_init_method=_leave_unset,
        embedding_init_method=_leave_unset,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
    )


def _pipeline_flags(parallel: ParallelConfig) -> dict[str, Any]:
    return {
        "pipeline_model_parallel_size": parallel.pp_size,
        # None, not 1: Megatron takes any number for an interleaved schedule.
        "virtual_pipeline_model_parallel_size": (
            parallel.vpp_size if parallel.vpp_size > 1 else None
        ),
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_stage,
        "account_for_embedding_in_pipeline_split": (
            parallel.account_for_embedding_in_pipeline_split
        ),
        "account_for_loss_in_pipeline_split": parallel.account_for_loss_in_pipeline_split,
        "pipeline_model_parallel_layout": parallel.pipeline_layout,
    }


def _expert_flags(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Top-k weights are normalised to 1: over a softmax, or over sigmoids where experts have a
    correction bias. A softmax over the chosen logits is that over all, normalised.

    Routers compute in the compute dtype, as transformers and engines do: in a finer one they would
    choose other experts than the rollout. Load is not balanced by a loss: it would pull the policy
    away from what its rewards say.
    """
    moe = model.moe
    if moe is None:
        return {}
    num_moe_layers = model.num_hidden_layers - moe.num_dense_layers
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.num_experts_per_tok,
        "moe_ffn_hidden_size": moe.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": moe.shared_intermediate_size or None,
        "moe_layer_freq": [0] * moe.num_dense_layers + [1] * num_moe_layers,
        "moe_router_enable_expert_bias": moe.has_expert_bias,
        "moe_router_score_function": "sigmoid" if moe.has_expert_bias else "softmax",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        # All experts of a rank in one kernel, which TransformerEngine brings.
        "moe_grouped_gemm": fused_kernels().has_transformer_engine,
        "expert_model_parallel_size": parallel.ep_size,
        "expert_tensor_parallel_size": parallel.expert_tp_size,
    }


def _leave_unset(_: Tensor) -> None:
    pass


def ddp_config(parallel: ParallelConfig, trainer: TrainerConfig) -> DistributedDataParallelConfig:
    """Return how gradients are summed: in fp32 and reduce-scattered to the optimizer's shards; all
    of them on every replica for Muon, which needs whole matrices."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=trainer.optimizer == "adamw",
        overlap_grad_reduce=parallel.overlap_data_parallel,
        overlap_param_gather=parallel.overlap_data_parallel,
        **fp8_gather_flags(trainer),
    )
