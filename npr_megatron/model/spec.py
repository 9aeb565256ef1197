"""Which modules a layer is made of: TransformerEngine's where it can be used, else Megatron's own.

Both give the same parameters and checkpoints. TransformerEngine fuses each norm into the linear
layer after it and so spells two norm weights differently; ``model.storages`` undoes that.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from npr_megatron.model.attention import BranchCore
from npr_megatron.model.norm import RMSNorm
from npr_megatron.runtime.fused_kernels import fused_kernels


def block_spec(config: TransformerConfig, chunk: int | None = None) -> TransformerBlockSubmodules:
    """Return the modules of the layers and of the final norm of this stage, or of its ``chunk``."""
    is_fused = fused_kernels().has_transformer_engine
    block: Any = get_gpt_decoder_block_spec(
        config, use_transformer_engine=is_fused, normalization="RMSNorm", vp_stage=chunk
    )
    for layer in block.layer_specs:
        modules: Any = layer.submodules
        attention = modules.self_attention.submodules
        attention.core_attention = BranchCore
        if is_fused:
            continue
        modules.input_layernorm = modules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    if not is_fused:
        block.layer_norm = RMSNorm
    return block
