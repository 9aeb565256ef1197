"""``config.json`` of an HF folder, written from an architecture.

Says what ``config.hf_architecture`` reads back and no more; what HF has a default for and weights
do not depend on (initialisation, caches, auxiliary losses) is left out.
"""

from __future__ import annotations

from typing import Any

from npr_megatron.config.model import ModelConfig, MoeConfig
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
    if problems := _unspeakable(model):
        raise LayoutError("\n".join(problems))
    return {
        "architectures": [_ARCHITECTURES[model.family]],
        "model_type": model.family,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        **model.model_dump(include=_COMMON_FIELDS),
        **_family_settings(model),
    }


def _family_settings(model: ModelConfig) -> dict[str, Any]:
    if model.family == "llama":
        return {"mlp_bias": False, "rope_scaling": None}
    if model.family == "glm4_moe":
        return {"use_qk_norm": model.has_qk_norm, "num_nextn_predict_layers": 0, **_glm(model.moe)}
    windows = {"rope_scaling": None, "use_sliding_window": False, "sliding_window": None}
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


def _unspeakable(model: ModelConfig) -> list[str]:
    """Return one sentence per setting that ``config.json`` of the family cannot express."""
    family, moe = model.family, model.moe
    is_moe_family = family in ("qwen3_moe", "glm4_moe")
    rules = [
        (is_moe_family and moe is None, "has routed experts and moe is not set; describe them"),
        (not is_moe_family and moe is not None, "is dense and moe is set; remove it"),
        (
            family in ("qwen3", "qwen3_moe") and not model.has_qk_norm,
            "normalises queries and keys and has_qk_norm is false; set it",
        ),
        (family == "llama" and model.has_qk_norm, "has no query and key norms; unset has_qk_norm"),
    ]
    if moe is not None:
        shared, inner = moe.shared_intermediate_size, moe.moe_intermediate_size
        rules += [
            (
                family == "qwen3_moe" and (shared > 0 or moe.has_expert_bias),
                "has neither shared experts nor an expert bias; remove them",
            ),
            (
                family == "glm4_moe" and not moe.has_expert_bias,
                "has an expert bias; set has_expert_bias",
            ),
            (
                family == "glm4_moe" and (shared == 0 or shared % inner > 0),
                f"counts its shared experts and shared_intermediate_size {shared} is no positive "
                f"multiple of moe_intermediate_size {inner}; change it",
            ),
        ]
    return [f"family {family} {sentence}" for is_broken, sentence in rules if is_broken]
