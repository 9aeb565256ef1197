"""``config.json`` of an HF folder, written from an architecture.

Says what ``config.hf_architecture`` reads back and no more; what HF has a default for and weights
do not depend on (initialisation, caches, auxiliary losses) is left out.
"""

from __future__ import annotations

from typing import Any

from npr_megatron.config.families import family_problems
from npr_megatron.config.model import ModelConfig, MoeConfig, RopeScaling
from npr_megatron.errors import LayoutError

_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
_COMMON_FIELDS = {
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "rope_theta",
    "rms_norm_eps",
    "tie_word_embeddings",
    "max_position_embeddings",
}


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """Return the ``config.json`` that transformers and ``config.hf_architecture`` read.

    Raises:
        LayoutError: the family has no word for something in ``model``; lists everything.
    """
    if problems := family_problems(model):
        raise LayoutError("\n".join(problems))
    return {
        "architectures": [_ARCHITECTURES[model.family]],
        "model_type": model.family,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "rope_scaling": _rope_scaling(model.rope_scaling),
        **model.model_dump(include=_COMMON_FIELDS),
        **_family_settings(model),
    }


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Return what transformers 4 writes, and 5 reads as well."""
    return None if scaling is None else {"rope_type": "llama3", **scaling.model_dump()}


def _family_settings(model: ModelConfig) -> dict[str, Any]:
    if model.family == "llama":
        return {"mlp_bias": False}
    if model.family == "glm4_moe":
        return {"use_qk_norm": model.has_qk_norm, "num_nextn_predict_layers": 0, **_glm(model.moe)}
    windows = {"use_sliding_window": False, "sliding_window": None}
    return windows if model.moe is None else {**windows, **_qwen_experts(model.moe)}


def _qwen_experts(moe: MoeConfig) -> dict[str, Any]:
    return {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "mlp_only_layers": list(range(moe.num_dense_layers)),
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    }


def _glm(moe: MoeConfig | None) -> dict[str, Any]:
    if moe is None:
        return {}
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "first_k_dense_replace": moe.num_dense_layers,
        "n_shared_experts": moe.shared_intermediate_size // moe.moe_intermediate_size,
    }
