"""Read the architecture of a model from the ``config.json`` of its HF folder. No torch, no weights.

What the package does not compute exactly (rope scaling, sliding windows, biases, quantised weights)
is refused, never skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from npr_megatron.config.model import ModelConfig
from npr_megatron.errors import InputError

_HF_DEFAULTS = {
    "tie_word_embeddings": False,
    "max_position_embeddings": 32_768,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
}
"""What a key that ``config.json`` leaves out means there; some differ from ModelConfig's
defaults."""


def read_architecture(folder: str | Path) -> ModelConfig:
    """Return the architecture described by ``folder/config.json``.

    Raises:
        InputError: the file is missing or broken, or describes a model that cannot be trained here;
            the message lists every reason.
    """
    path = Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"model folder {folder} has no config.json; give an HF folder "
            "(config.json, *.safetensors, tokenizer files)"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}; download it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object; download it again")
    table = cast("dict[str, Any]", found)
    # transformers 5 writes the rotary settings as a table of their own, older versions flat
    rope: dict[str, Any] = table.get("rope_parameters") or table.get("rope_scaling") or {}
    fields = {name: table[name] for name in ModelConfig.model_fields if name in table}
    if "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
    reasons = _unsupported(table, rope)
    try:
        model = ModelConfig.model_validate({**_HF_DEFAULTS, **fields})
    except ValidationError as error:
        reasons += [_reason(detail["loc"][0], fields) for detail in error.errors()]
        model = None
    if model is None or reasons:
        raise InputError(
            f"{path} is no dense Qwen3 that can be trained: {'; '.join(reasons)}; use another model"
        )
    return model


def _unsupported(table: Mapping[str, Any], rope: Mapping[str, Any]) -> list[str]:
    """Return one sentence per setting that would change the mathematics."""
    layer_types = sorted(set(table.get("layer_types") or ()) - {"full_attention"})
    checks: tuple[tuple[str, Any, Any], ...] = (
        ("architectures", table.get("architectures"), ["Qwen3ForCausalLM"]),
        ("hidden_act", table.get("hidden_act", "silu"), "silu"),
        ("attention_bias", table.get("attention_bias", False), False),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0),
        ("use_sliding_window", table.get("use_sliding_window", False), False),
        ("layer types beside full_attention", layer_types, []),
        ("quantization_config", table.get("quantization_config"), None),
    )
    return [
        f"{name} is {json.dumps(found)}, supported is {json.dumps(supported)}"
        for name, found, supported in checks
        if found != supported
    ]


def _reason(name: int | str, fields: Mapping[str, Any]) -> str:
    if name not in fields:
        return f"{name} is missing"
    return f"{name} cannot be {json.dumps(fields[str(name)])}"
