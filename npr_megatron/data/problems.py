"""A question with its reference answer, and JSONL files of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npr_megatron.errors import InputError

_FIELDS = ("id", "question", "answer")
_MAX_LISTED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question whose short answer can be checked.

    Example::

        Problem(id="train/7", question="What is 3/4 of 12?", answer="9")
    """

    id: str
    """Unique within its source; names the prompt group of its rollouts."""
    question: str
    answer: str
    """Reference, compared by ``rewards.answer.answers_match``."""


def read_jsonl(path: str | Path) -> list[Problem]:
    """Read problems, one ``{"id", "question", "answer"}`` object a line.

    Blank lines and further keys are ignored; a number is taken as its JSON spelling.

    Raises:
        InputError: the file is missing or empty, or lines are wrong; every wrong line is named.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(
            f"problems were to be read from {file}; no such file; set task.train_path and "
            "task.test_path to JSONL files of problems"
        )
    faults: list[str] = []
    problems: dict[str, Problem] = {}
    # Not splitlines(): a question may hold other line separators, such as U+2028, unescaped.
    for number, line in enumerate(_text_of(file).split("\n"), start=1):
        if not line.strip():
            continue
        problem = _parse_line(line)
        if isinstance(problem, str):
            faults.append(f"line {number}: {problem}")
        elif problem.id in problems:
            faults.append(f"line {number}: the id {problem.id!r} was used before")
        else:
            problems[problem.id] = problem
    if not problems and not faults:
        faults.append("the file holds no problem")
    if faults:
        more = len(faults) - _MAX_LISTED
        listed = faults[:_MAX_LISTED] + ([f"and {more} more"] if more > 0 else [])
        raise InputError(
            f'{file}: each line must be a JSON object with "id", "question" and "answer"; found '
            f"{len(faults)} wrong: {'; '.join(listed)}; correct or delete these lines"
        )
    return list(problems.values())


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: problems must be UTF-8 text; byte {error.start} is not; convert the file"
        ) from error


def _parse_line(line: str) -> Problem | str:
    """Return the problem, or what is wrong with the line."""
    try:
        data: Any = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    if not isinstance(data, dict):
        return f"a JSON {type(data).__name__}, not an object"
    missing = [field for field in _FIELDS if field not in data]
    if missing:
        return f"lacks {', '.join(missing)}"
    wrong = [field for field in _FIELDS if not _is_text(data[field])]
    if wrong:
        return f"empty or not text: {', '.join(wrong)}"
    return Problem(**{field: str(data[field]).strip() for field in _FIELDS})


def _is_text(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float) or (isinstance(value, str) and bool(value.strip()))
