"""Read a run file: TOML plus dotted overrides -> RunConfig, or one ConfigError that lists every
problem.

Only shapes and ranges of single fields are judged here; rules that join sections are in
``config.check``. Nothing is filled in later: what this module returns is the whole description of a
run.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from npr_megatron.config.base import Section
from npr_megatron.config.explain import explain
from npr_megatron.config.run import RunConfig
from npr_megatron.errors import ConfigError

File = TypeVar("File", bound=Section)
Table = dict[str, Any]
DottedPath = tuple[str, ...]


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the run described by the TOML file ``path`` after applying ``overrides``.

    An override is ``section.key=value``; its value is TOML, and a value that is not TOML is taken
    as a bare string. Entries of arrays are addressed by number.

    Raises:
        ConfigError: the file is missing or no TOML, an override cannot be applied, or fields are
        wrong.
            Every problem found is in ``problems``.

    Example:
        ``load_run("run.toml", ["zero.num_steps=3", "seed_stage.phases.0.num_steps=50"])``
    """
    return load_as(RunConfig, path, overrides)


def load_as(section: type[File], path: str | Path, overrides: Sequence[str] = ()) -> File:
    """Return what :func:`load_run` does, of a file that is a ``section``."""
    table = read_toml(path)
    raw_values, problems = _apply(table, overrides)
    try:
        config = _validate(section, table, raw_values)
    except ValidationError as error:
        problems.extend(explain(error, section))
        config = None
    if problems or config is None:
        raise ConfigError(problems)
    return config


def read_toml(path: str | Path, file: str = "run file") -> Table:
    """Return the parsed TOML file ``path``; ConfigError when it is missing, unreadable or broken.

    ``file`` is what its author calls it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file} {path} does not exist; give the path of a .toml file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} {path} cannot be read: {error}; give a UTF-8 text file"
        ) from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{file} {path} is not valid TOML: {error}; strings need quotes, a key stands once "
            "per table"
        ) from error


def parse_value(text: str) -> Any:
    """Return ``text`` read as a TOML value, or ``text`` itself where it is none."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if list(table) == ["value"] else text


def _apply(table: Table, overrides: Sequence[str]) -> tuple[dict[DottedPath, str], list[str]]:
    """Write the overrides into ``table``; return their raw texts by path, and the problems met."""
    raw_values: dict[DottedPath, str] = {}
    problems: list[str] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        path = tuple(part.strip() for part in name.split("."))
        if not equals or not all(path):
            problems.append(
                f"override {override!r} is not of the form section.key=value; "
                "write for example zero.num_steps=3"
            )
        elif problem := _put(table, path, parse_value(text)):
            problems.append(f"override {override!r}: {problem}")
        else:
            raw_values[path] = text
    return raw_values, problems


def _put(table: Table, path: DottedPath, value: Any) -> str | None:
    """Set ``path`` in ``table``, making tables on the way; return what stands in the way."""
    node: Any = table
    for depth in range(len(path)):
        entries, index, problem = _entry(node, path, depth)
        if problem:
            return problem
        if depth == len(path) - 1:
            entries[index] = value
        else:
            node = entries[index]
    return None


def _entry(node: Any, path: DottedPath, depth: int) -> tuple[Any, str | int, str | None]:
    """Return ``node``, how ``path[depth]`` indexes it, and why it cannot, if it cannot."""
    key, parent = path[depth], ".".join(path[:depth])
    if isinstance(node, dict):
        table = cast("Table", node)
        if depth < len(path) - 1:
            table.setdefault(key, {})
        return table, key, None
    if isinstance(node, list):
        entries = cast("list[Any]", node)
        if key.isdecimal() and int(key) < len(entries):
            return entries, int(key), None
        return entries, 0, f"{parent} has {len(entries)} entries, found {key!r}; count them from 0"
    return node, key, f"{parent} is {node!r} and has no keys; set {parent} itself"


def _validate(section: type[File], table: Table, raw_values: dict[DottedPath, str]) -> File:
    """Validate strictly, so that ``true`` is no number; retry overrides whose text was meant as a
    string."""
    try:
        return _validate_once(section, table)
    except ValidationError as error:
        retry = [
            path
            for detail in error.errors()
            if detail["type"] == "string_type"
            and (path := tuple(str(part) for part in detail["loc"])) in raw_values
        ]
        if not retry:
            raise
    for path in retry:
        _put(table, path, raw_values[path])
    return _validate_once(section, table)


def _validate_once(section: type[File], table: Table) -> File:
    # JSON mode is the strict mode that still turns arrays into tuples. TOML dates become strings.
    return section.model_validate_json(json.dumps(table, default=str), strict=True)
