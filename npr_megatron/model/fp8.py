"""FP8 in Megatron's words: pure, configuration in, keyword arguments out.

Linear layers of the decoder multiply in FP8 through TransformerEngine; attention stays in the
compute dtype, because branch attention is not TransformerEngine's. Largest magnitudes are reduced
over all ranks that share a layer (tp * cp * dp): replicas then scale alike, and a checkpoint holds
one history.
"""

from __future__ import annotations

from typing import Any

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import TrainerConfig

_FORMATS = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
"""Formats of weights and activations, and of gradients: e4m3 for both where every small block has a
scale of its own; ``hybrid`` gives gradients, which spread wider, e5m2 where a tensor has one."""
_AMAX_HISTORY = {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
"""Delayed scaling follows the largest magnitude of so many passes, as TransformerEngine does by
itself; Megatron's own default, the last pass alone, saturates whenever a tensor grows."""


def fp8_flags(model: ModelConfig, trainer: TrainerConfig) -> dict[str, Any]:
    """Return what FP8 adds to Megatron's TransformerConfig; nothing without it."""
    if trainer.fp8 is None:
        return {}
    num_first, num_last = trainer.num_first_layers_bf16, trainer.num_last_layers_bf16
    return {
        "fp8": _FORMATS[trainer.fp8],
        "fp8_recipe": trainer.fp8,
        "fp8_param": trainer.fp8_params,
        "fp8_dot_product_attention": False,
        "tp_only_amax_red": False,
        "first_last_layers_bf16": num_first + num_last > 0,
        "num_layers_at_start_in_bf16": num_first,
        "num_layers_at_end_in_bf16": num_last,
        # An expert gets any number of tokens; the router fills up with tokens of weight 0, which
        # costs less than padding each expert's tokens afterwards.
        "moe_router_padding_for_quantization": model.moe is not None,
        **(_AMAX_HISTORY if trainer.fp8 == "delayed" else {}),
    }


def fp8_gather_flags(trainer: TrainerConfig) -> dict[str, Any]:
    """Return what FP8 weights add to Megatron's DistributedDataParallelConfig."""
    return {
        "fp8_param_gather": trainer.fp8_params,
        "reuse_grad_buf_for_mxfp8_param_ag": _gathers_among_gradients(trainer),
    }


def fp8_optimizer_flags(trainer: TrainerConfig) -> dict[str, Any]:
    """Return what FP8 weights add to Megatron's OptimizerConfig.

    The optimizer asks for the recipe because of the weights it writes; weights kept in the compute
    dtype are none of its business.
    """
    return {
        "fp8_recipe": trainer.fp8 if trainer.fp8_params else None,
        "reuse_grad_buf_for_mxfp8_param_ag": _gathers_among_gradients(trainer),
    }


def _gathers_among_gradients(trainer: TrainerConfig) -> bool:
    """MXFP8 keeps two copies of a weight, scaled along rows and along columns; neither can be cut
    over replicas, so they gather bf16 in the gradients' room and each quantises the whole."""
    return trainer.fp8_params and trainer.fp8 == "mxfp8"
