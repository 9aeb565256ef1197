"""What a row asks and what is to be answered, in either of the two forms a row may have.

``{"prompt": text, "response": text}``, or ``{"messages": [{"role", "content"}, ...]}``, where each
message of the role ``assistant`` is a response of its own to all that stands before it. Further
fields of a row are left alone. Texts only: no tokenizer is needed to find a bad row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npr_megatron.data.rows import Fault, Row, files_of, list_faults, read_rows
from npr_megatron.errors import NprError

_FORMS = 'give "prompt" and "response", or "messages"'
_MAX_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """One response to learn."""

    place: str
    """Of the row; with the number of the message where a row has several responses."""
    response: str
    prompt: str | None = None
    """The question, to be asked in the words every engine is asked in; None in a conversation."""
    context: tuple[Message, ...] = ()
    """The messages before the response, word for word; empty where there is a prompt."""


def read_exchanges(path: Path) -> Iterator[Exchange | Fault]:
    """Yield what the rows of a file or saved dataset hold, see ``data.rows.read_rows``."""
    for row in read_rows(path):
        if isinstance(row, Fault):
            yield row
        else:
            yield from exchanges_of(row)


def check_rows(patterns: Iterable[str]) -> list[str]:
    """Return what is wrong with files and rows, as far as it can be told without a tokenizer."""
    problems: list[str] = []
    faults: list[Fault] = []
    for pattern in patterns:
        try:
            for path in files_of(pattern):
                faults += [found for found in read_exchanges(path) if isinstance(found, Fault)]
        except NprError as error:
            problems.append(str(error))
    return problems + list_faults(faults)


def exchanges_of(row: Row) -> list[Exchange | Fault]:
    """Return the responses of ``row``, or what is wrong with it, field by field."""
    fields = {name: value for name, value in row.fields.items() if value is not None}
    has_pair, has_messages = "prompt" in fields or "response" in fields, "messages" in fields
    if has_pair and has_messages:
        return [_fault(row.place, f'both "prompt" and "messages" are there; {_FORMS}')]
    if has_messages:
        return _conversation(row.place, fields["messages"])
    if has_pair:
        return _pair(row.place, row.fields)
    found = ", ".join(row.fields) or "none"
    return [_fault(row.place, f"its fields are {found}; {_FORMS}")]


def _pair(place: str, fields: Mapping[str, Any]) -> list[Exchange | Fault]:
    faults = [
        _fault(place, problem)
        for name in ("prompt", "response")
        if (problem := _text_problem(name, fields.get(name)))
    ]
    return [*faults] or [Exchange(place, fields["response"], prompt=fields["prompt"])]


def _conversation(place: str, messages: Any) -> list[Exchange | Fault]:
    if not isinstance(messages, list) or not messages:
        return [_fault(place, f"messages is {_shown(messages)}; it must be a list of messages")]
    faults = [
        _fault(place, problem)
        for number, message in enumerate(messages)
        for problem in _message_problems(f"messages[{number}]", message)
    ]
    if faults:
        return [*faults]
    turns = tuple(Message(message["role"], message["content"]) for message in messages)
    answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        return [_fault(place, 'messages holds no message of the role "assistant" to learn')]
    if answers[0] == 0:
        return [_fault(place, "messages[0] is a response to nothing; begin with what was asked")]
    return [
        Exchange(
            place if len(answers) == 1 else f"{place} messages[{number}]",
            turns[number].content,
            context=turns[:number],
        )
        for number in answers
    ]


def _message_problems(name: str, message: Any) -> list[str]:
    if not isinstance(message, dict):
        return [f'{name} is {_shown(message)}; it must have "role" and "content"']
    problems = [
        f"{name}.{key} is {_shown(value)}, which training would lose; remove it"
        for key, value in message.items()
        if key not in ("role", "content") and value is not None
    ]
    texts = (_text_problem(f"{name}.{key}", message.get(key)) for key in ("role", "content"))
    return problems + [problem for problem in texts if problem]


def _text_problem(name: str, value: Any) -> str | None:
    if isinstance(value, str):
        return None if value.strip() else f"{name} is empty"
    return f"{name} is {_shown(value)}; it must be text"


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    text = json.dumps(value, default=repr)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def _fault(place: str, message: str) -> Fault:
    return Fault(place, "corrupt", message)
