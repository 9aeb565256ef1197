"""Read the architecture of a model from the ``config.json`` of its HF folder. No torch, no weights.

Two questions, two readers: :func:`read_architecture` accepts every model whose weights have a
layout here, :func:`read_trainable_architecture` only those that training and decoding compute
exactly. What they do not know is refused, never skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from npr_megatron.config.families import TRAINABLE_FAMILIES
from npr_megatron.config.model import ModelConfig, RopeScaling
from npr_megatron.errors import InputError

_FAMILIES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "LlamaForCausalLM": "llama",
    "Glm4MoeForCausalLM": "glm4_moe",
}
_TRAINABLE = tuple(name for name, family in _FAMILIES.items() if family in TRAINABLE_FAMILIES)
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-6},
    "qwen3_moe": {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-6},
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "glm4_moe": {"max_position_embeddings": 131_072, "rms_norm_eps": 1e-5},
}
"""What a key that ``config.json`` leaves out means there; some differ from ModelConfig's
defaults."""
_EXPERT_KEYS = {
    "qwen3_moe": {
        "num_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_tok",
        "moe_intermediate_size": "moe_intermediate_size",
    },
    "glm4_moe": {
        "num_experts": "n_routed_experts",
        "num_experts_per_tok": "num_experts_per_tok",
        "moe_intermediate_size": "moe_intermediate_size",
        "num_dense_layers": "first_k_dense_replace",
        "shared_intermediate_size": "n_shared_experts",
    },
}
"""Keys of ``config.json`` behind the fields of MoeConfig."""
_READ_ELSEWHERE = {"family", "has_qk_norm", "moe", "rope_scaling"}
"""Fields of ModelConfig that are no keys of ``config.json``."""


def read_architecture(folder: str | Path) -> ModelConfig:
    """Return the architecture described by ``folder/config.json``, for moving its weights.

    Raises:
        InputError: the file is missing or broken, or describes weights without a layout here; the
            message lists every reason.
    """
    path = Path(folder) / "config.json"
    model, reasons = _describe(_read_table(path), tuple(_FAMILIES))
    if model is None or reasons:
        raise InputError(
            f"{path} is no model whose weights can be laid out: {'; '.join(reasons)}; "
            "use another model"
        )
    return model


def read_trainable_architecture(folder: str | Path) -> ModelConfig:
    """Return the architecture described by ``folder/config.json``, for training and decoding.

    Raises:
        InputError: the file is missing or broken, or describes a model that cannot be trained here;
            the message lists every reason.
    """
    path = Path(folder) / "config.json"
    table = _read_table(path)
    model, reasons = _describe(table, _TRAINABLE)
    reasons += not_computed(table)
    if model is None or reasons:
        raise InputError(
            f"{path} is no model that can be trained: {'; '.join(reasons)}; use another model"
        )
    return model


def not_computed(table: Mapping[str, Any]) -> list[str]:
    """Return one sentence per setting of a ``config.json`` that changes the mathematics and no
    weight, and that training and decoding do not follow."""
    rope = _rope_settings(table)
    layer_types: Any = table.get("layer_types") or []
    if isinstance(layer_types, list):
        known = cast("list[Any]", layer_types)
        layer_types = [t for i, t in enumerate(known) if t not in ("full_attention", *known[:i])]
    rope_type, factor = _rope_type(rope), "partial_rotary_factor"
    checks: list[tuple[str, Any, Any]] = [
        ("hidden_act", table.get("hidden_act", "silu"), "silu"),
        ("rope_type", rope_type, "llama3" if rope_type == "llama3" else "default"),
        ("rope settings by layer", [n for n, value in rope.items() if isinstance(value, dict)], []),
        (factor, rope.get(factor, table.get(factor)) or 1.0, 1.0),
        ("use_sliding_window", table.get("use_sliding_window", False), False),
        ("layer types beside full_attention", layer_types, []),
    ]
    if table.get("architectures") == ["Qwen3MoeForCausalLM"]:
        # Weights of the chosen experts sum to one. Left out, transformers does not normalise them.
        checks.append(("norm_topk_prob", table.get("norm_topk_prob", False), True))
    return _differences(checks)


def _read_table(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"model folder {path.parent} has no config.json; give an HF folder "
            "(config.json, *.safetensors, tokenizer files)"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}; download it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object; download it again")
    return cast("dict[str, Any]", found)


def _describe(
    table: Mapping[str, Any], supported: Sequence[str]
) -> tuple[ModelConfig | None, list[str]]:
    """Return the model of one of the ``supported`` architectures, and why it may not be used."""
    reasons = _without_layout(table, supported)
    named = [name for name in supported if table.get("architectures") == [name]]
    family = _FAMILIES[[*named, *supported][0]]
    fields, more_reasons = _fields(table, family)
    reasons += more_reasons
    try:
        model = ModelConfig.model_validate(fields)
    except ValidationError as error:
        return None, reasons + [_reason(detail["loc"], fields) for detail in error.errors()]
    return model, reasons


def _without_layout(table: Mapping[str, Any], supported: Sequence[str]) -> list[str]:
    """Return one sentence per setting that gives the model weights no layout knows."""
    found = table.get("architectures")
    reasons: list[str] = []
    if found not in [[name] for name in supported]:
        wanted = " or ".join(json.dumps([name]) for name in supported)
        reasons.append(f"architectures is {json.dumps(found)}, supported is {wanted}")
    checks: tuple[tuple[str, Any, Any], ...] = (
        ("attention_bias", table.get("attention_bias", False), False),
        ("mlp_bias", table.get("mlp_bias", False), False),
        ("decoder_sparse_step", table.get("decoder_sparse_step", 1), 1),
        ("quantization_config", _unreadable_quantisation(table), None),
    )
    reasons += [
        f"{name} is {json.dumps(table[name])}, supported is a table"
        for name in ("rope_parameters", "rope_scaling")
        if not isinstance(table.get(name) or {}, dict)
    ]
    return reasons + _differences(checks)


def _unreadable_quantisation(table: Mapping[str, Any]) -> Any:
    """Return how weights are quantised; None where they are not, or in FP8 blocks, which
    ``weights.checkpoints.hf`` reads as the numbers they stand for."""
    found = table.get("quantization_config")
    blockwise = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    is_blockwise = isinstance(found, dict) and found == {**found, **blockwise}
    return None if is_blockwise else table.get("quantization_config")


def _fields(table: Mapping[str, Any], family: str) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a ModelConfig, as far as ``table`` has them, and what is wrong."""
    reasons: list[str] = []
    names = [name for name in ModelConfig.model_fields if name not in _READ_ELSEWHERE]
    fields: dict[str, Any] = {
        "family": family,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "has_qk_norm": family in ("qwen3", "qwen3_moe"),
        **_HF_DEFAULTS[family],
        **{name: table[name] for name in names if name in table},
    }
    rope = _rope_settings(table)
    if "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
    if _rope_type(rope) == "llama3":
        settings = RopeScaling.model_fields
        fields["rope_scaling"] = {name: rope[name] for name in settings if name in rope}
    if family != "qwen3" and table.get("head_dim") is None:
        fields |= _default_head_dim(fields)
    if family == "qwen3_moe":
        fields["moe"], reasons = _qwen_experts(table)
    if family == "glm4_moe":
        fields["has_qk_norm"] = table.get("use_qk_norm", False)
        fields["moe"] = _glm_experts(table)
    return fields, reasons


def _default_head_dim(fields: Mapping[str, Any]) -> dict[str, int]:
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1:
        return {}  # the missing field has a sentence of its own
    return {"head_dim": hidden // heads}


def _qwen_experts(table: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    fields = _expert_fields(table, "qwen3_moe")
    if "num_local_experts" in table:  # what transformers 5 writes
        fields["num_experts"] = table["num_local_experts"]
    dense: Any = table.get("mlp_only_layers") or []
    if isinstance(dense, list) and dense == [*range(len(cast("list[Any]", dense)))]:
        return {**fields, "num_dense_layers": len(cast("list[Any]", dense))}, []
    return fields, [
        f"mlp_only_layers is {json.dumps(dense)}, supported are none or the first layers "
        "(0, 1, ...)"
    ]


def _glm_experts(table: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {"num_dense_layers": 1, "shared_intermediate_size": 1, "has_expert_bias": True}
    fields = {**defaults, **_expert_fields(table, "glm4_moe")}
    num_shared, inner = fields["shared_intermediate_size"], fields.get("moe_intermediate_size")
    if isinstance(num_shared, int) and isinstance(inner, int) and num_shared > 0:
        fields["shared_intermediate_size"] = num_shared * inner
    return fields


def _expert_fields(table: Mapping[str, Any], family: str) -> dict[str, Any]:
    keys = _EXPERT_KEYS[family].items()
    return {field: table[key] for field, key in keys if key in table}


def _rope_settings(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings: transformers 5 writes a table of their own, older ones flat."""
    found: Any = table.get("rope_parameters") or table.get("rope_scaling")
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _differences(checks: Sequence[tuple[str, Any, Any]]) -> list[str]:
    return [
        f"{name} is {json.dumps(found)}, supported is {json.dumps(supported)}"
        for name, found, supported in checks
        if found != supported
    ]


def _reason(place: tuple[int | str, ...], fields: Mapping[str, Any]) -> str:
    """Return what is wrong with the field at ``place``, in the words of ``config.json``."""
    name, family = str(place[-1]), fields["family"]
    key = _EXPERT_KEYS[family].get(name, name) if place[0] == "moe" else name
    found = fields if len(place) == 1 else fields[str(place[0])]
    return f"{key} cannot be {json.dumps(found[name])}" if name in found else f"{key} is missing"
