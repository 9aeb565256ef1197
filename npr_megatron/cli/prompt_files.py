"""Prompts from the command line, from files and from standard input, each with a name."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npr_megatron.errors import InputError

STDIN = "-"
"""Stands for standard input, as a prompt and as a file."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question and where it came from."""

    name: str
    """``prompt 1`` for the first argument, ``problems.jsonl:7`` for a line, or the line's "id"."""
    text: str


def read_prompts(arguments: Sequence[str], file: Path | None) -> list[Prompt]:
    """Return all prompts: arguments in order (``-`` is standard input), then those of ``file``.

    A text has one prompt per line. A ``.jsonl`` file, or standard input whose first line is a JSON
    object with a "question", has one object per line.

    Raises:
        InputError: there is none, the file cannot be read, a line has no question (all are listed),
            or two prompts have one name.
    """
    prompts: list[Prompt] = []
    for number, argument in enumerate(arguments, start=1):
        if argument == STDIN:
            prompts += _read_stdin()
        else:
            prompts.append(Prompt(f"prompt {number}", argument))
    if file is not None:
        prompts += _read_stdin() if str(file) == STDIN else _read_file(file)
    if not prompts:
        raise InputError("no prompt was given; add one in quotes, --file, or - for standard input")
    twice = [name for name, times in Counter(p.name for p in prompts).items() if times > 1]
    if twice:
        raise InputError(
            f"prompts must have names of their own, but {len(twice)} occur twice, such as "
            f'"{twice[0]}"; change the "id" of one of them'
        )
    return prompts


def _read_file(path: Path) -> list[Prompt]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"prompt file {path} does not exist; give a text or .jsonl file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt file {path} cannot be read: {error}; give UTF-8 text") from error
    return _prompts_of(path.name, text, is_json=path.suffix == ".jsonl")


def _read_stdin() -> list[Prompt]:
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InputError(f"standard input cannot be read: {error}; give UTF-8 text") from error
    first = text.lstrip().split("\n", 1)[0]
    return _prompts_of("stdin", text, is_json=_question(first) is not None)


def _prompts_of(source: str, text: str, *, is_json: bool) -> list[Prompt]:
    # Not splitlines: a question may hold one of the other signs that end a line.
    lines = [(f"{source}:{n}", line) for n, line in enumerate(text.split("\n"), start=1)]
    filled = [(place, line) for place, line in lines if line.strip()]
    if not is_json:
        return [Prompt(place, line.removesuffix("\r")) for place, line in filled]
    prompts: list[Prompt] = []
    problems: list[str] = []
    for place, line in filled:
        record = _question(line)
        if record is None:
            problems.append(f'{place} has no "question" text; write {{"question": "..."}}')
        else:
            name = record.get("id")
            prompts.append(Prompt(name if isinstance(name, str) else place, record["question"]))
    if problems:
        raise InputError("\n".join(problems))
    return prompts


def _question(line: str) -> dict[str, Any] | None:
    """Return the object in ``line`` if it has a question."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    if isinstance(record, dict) and isinstance(record.get("question"), str):
        return record
    return None
