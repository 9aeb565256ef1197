"""Which modules a layer is made of: TransformerEngine's on CUDA, Megatron's local ones on CPU.

Both give the same parameters. The CUDA spec fuses each norm into the linear layer after it and so
spells two norm weights differently; ``model.storages`` undoes that.
"""

from __future__ import annotations

from typing import Any, Literal

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from npr_megatron.model.attention import DenseBranchCore, FlexBranchCore
from npr_megatron.model.norm import RMSNorm


def block_spec(
    config: TransformerConfig, device_type: Literal["cuda", "cpu"]
) -> TransformerBlockSubmodules:
    """Return the modules of this pipeline stage's layers and of the final norm."""
    if device_type == "cuda":
        from megatron.core.extensions.transformer_engine import TENorm

        layer: Any = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
        layer.submodules.self_attention.submodules.core_attention = FlexBranchCore
        final_norm: Any = TENorm
    else:
        layer = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = DenseBranchCore
        attention.q_layernorm = attention.k_layernorm = RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        final_norm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=final_norm
    )
