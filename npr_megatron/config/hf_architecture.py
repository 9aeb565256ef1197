"""Read the architecture of a model from the ``config.json`` of its HF folder. No torch, no weights
touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from npr_megatron.config.model import ModelConfig
from npr_megatron.errors import InputError

SUPPORTED_CLASS = "Qwen3ForCausalLM"


def read_architecture(folder: str | Path) -> ModelConfig:
    """Return the architecture described by ``folder/config.json``.

    Raises:
        InputError: the file is missing or broken, names another model class, or lacks fields.
    """
    path = Path(folder) / "config.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"model folder {folder} has no config.json; give an HF folder "
            "(config.json, *.safetensors, tokenizer files)"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}; download it again") from error
    if not isinstance(table, dict):
        raise InputError(f"{path} holds {type(table).__name__}, not an object; download it again")
    return _architecture(table, path)


def _architecture(table: dict[str, Any], path: Path) -> ModelConfig:
    classes = table.get("architectures") or []
    if SUPPORTED_CLASS not in classes:
        raise InputError(
            f"{path} describes {', '.join(classes) or 'no model class'}, expected "
            f"{SUPPORTED_CLASS}; "
            "use a dense Qwen3 model"
        )
    fields = {name: table[name] for name in ModelConfig.model_fields if name in table}
    # transformers 5 moved the base of the rotary frequencies into a table of its own
    rope = table.get("rope_parameters") or {}
    if "rope_theta" not in fields and "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default" or table.get("rope_scaling"):
        raise InputError(
            f"{path} scales rotary positions, which is not supported; use a plain Qwen3"
        )
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        names = ", ".join(str(detail["loc"][0]) for detail in error.errors())
        raise InputError(f"{path} has no usable value for {names}; download it again") from error
