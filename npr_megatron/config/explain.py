"""Say what is wrong with a run file in the words of its author: dotted path, what was found, what
to do.

The expectation in each sentence comes from the JSON Schema of ``RunConfig``, so ranges, choices and
key names are stated once, in the sections themselves.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from npr_megatron.config.run import RunConfig

Schema = dict[str, Any]
_TYPE_NAMES = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "array": "an array",
    "object": "a table",
}
_BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}


def explain(
    error: ValidationError, section: type[BaseModel] = RunConfig, file: str = "the run file"
) -> list[str]:
    """Return one sentence per problem in ``error``, in the order of the file's sections.

    Args:
        section: what was validated.
        file: what an author calls the whole of it.
    """
    root = section.model_json_schema()
    return [_sentence(detail, root, file) for detail in error.errors()]


def nearest(name: str, names: Sequence[str]) -> str | None:
    """Return the one of ``names`` a typist of ``name`` most likely meant, or None."""
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.6)), None)


def _sentence(detail: ErrorDetails, root: Schema, file: str) -> str:
    keys, node, parent = _locate(detail["loc"], root)
    path, kind = _dotted(keys), detail["type"]
    if kind == "extra_forbidden":
        return _unknown_key(keys, parent, file)
    if kind == "missing":
        return f"{path} is missing; {_how_to_add(keys, node)}"
    if kind == "union_tag_not_found":
        return (
            f"{path}.kind is missing; set it to {_choices(list(node['discriminator']['mapping']))}"
        )
    if kind == "union_tag_invalid":
        tags = _choices(list(node["discriminator"]["mapping"]))
        return f"{path}.kind is {_shown(detail['input']['kind'])}; set it to {tags}"
    meaning = node.get("description")
    what = f" ({meaning.rstrip('.').replace('``', '')})" if meaning else ""
    return f"{path}{what} is {_shown(detail['input'])}; set it to {_expected(node)}"


def _locate(
    location: tuple[int | str, ...], root: Schema
) -> tuple[list[str | int], Schema, Schema]:
    """Return the path as the author writes it, the schema at its end and that of the table around
    it."""
    keys: list[str | int] = []
    node, parent = root, root
    for part in location:
        node = _plain(node, root)
        mapping = node.get("discriminator", {}).get("mapping", {})
        if part in mapping:  # pydantic puts the value of ``kind`` into the path
            node = {"$ref": mapping[part]}
            continue
        keys.append(part)
        parent = node
        if isinstance(part, int):
            node = node.get("items", {})
        else:
            node = node.get("properties", {}).get(part, node.get("additionalProperties") or {})
    return keys, _plain(node, root), _plain(parent, root)


def _plain(node: Schema, root: Schema) -> Schema:
    """Follow a reference and drop the null of an optional field; keep the field's own
    description."""
    own = {key: value for key, value in node.items() if key in ("description", "default")}
    for option in node.get("anyOf", ()):
        if option.get("type") != "null":
            node = option
    while "$ref" in node:
        node = root["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return {**node, **own}


def _unknown_key(keys: list[str | int], parent: Schema, file: str) -> str:
    names = list(parent.get("properties", {}))
    table = f"[{_dotted(keys[:-1])}]" if len(keys) > 1 else file
    meant = nearest(str(keys[-1]), names)
    remedy = f"did you mean {meant}?" if meant else f"its keys are {', '.join(names)}"
    return f"{_dotted(keys)} is not a key of {table}; {remedy}"


def _how_to_add(keys: list[str | int], node: Schema) -> str:
    if "properties" in node:
        required = ", ".join(node.get("required", ()))
        return f"add a table [{_dotted(keys)}]" + (f" with {required}" if required else "")
    table = f" to [{_dotted(keys[:-1])}]" if len(keys) > 1 else ""
    return f"add {keys[-1]} = <{_expected(node)}>{table}"


def _expected(node: Schema) -> str:
    """Describe the values ``node`` accepts: ``an integer, at least 1``."""
    if "const" in node:
        return _shown(node["const"])
    if "enum" in node:
        return _choices(node["enum"])
    if "discriminator" in node:
        return "a table"
    bounds = [f"{words} {node[key]:g}" for key, words in _BOUNDS.items() if key in node]
    return ", ".join([_TYPE_NAMES.get(node.get("type", ""), "another value"), *bounds])


def _choices(values: Sequence[Any]) -> str:
    return " or ".join(_shown(value) for value in values)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _dotted(keys: Sequence[str | int]) -> str:
    return ".".join(str(key) for key in keys)
