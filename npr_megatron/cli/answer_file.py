"""Answers as JSON lines: what a line says, and a file of them that survives an interrupt."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from npr_megatron.engine.events import FinishEvent
from npr_megatron.errors import InputError
from npr_megatron.observability.metrics import drop_unfinished_line, read_json_lines
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import FinishReason
from npr_megatron.report.outline import Box, outline


def key_of(model_folder: Path, request: GenerationRequest) -> str:
    """Return what tells this answer from others: model folder, prompt, settings and seed."""
    fields = [str(model_folder.resolve()), dataclasses.asdict(request)]
    return hashlib.blake2b(json.dumps(fields).encode(), digest_size=12).hexdigest()


def answer_line(key: str, question: str, end: FinishEvent, pieces: Sequence[str]) -> dict[str, Any]:
    """Return the record of one answer.

    Args:
        key: see :func:`key_of`.
        question: as it was asked; the prompt around it is part of the trajectory.
        end: its trajectory of T tokens, and what it has taken.
        pieces: [T] decoded string of each token.
    """
    trajectory = end.trajectory
    stop = -1 if trajectory.finish is FinishReason.STOP else None  # without the end token
    return {
        "id": trajectory.prompt_id,
        "sample": trajectory.rollout,
        "question": question,
        "text": "".join(pieces[trajectory.prompt_length : stop]),
        "finish": str(trajectory.finish),
        "finish_detail": trajectory.finish_detail,
        "total_tokens": trajectory.num_tokens,
        "critical_path_tokens": trajectory.critical_path_tokens,
        "resident_kv_tokens": end.usage.resident_kv,
        "outline": [_box(box) for box in outline(trajectory, pieces)[1:]],
        "key": key,
        "trajectory": trajectory.to_json(),
    }


class AnswerFile:
    """Appends answers to a JSONL file, each line whole and handed to the operating system at once.

    A line that a killed process left half written is removed; finished ones stay.

    Raises:
        InputError: the file holds lines that are no answers, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            drop_unfinished_line(path)
            lines = read_json_lines(path)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"answers were to be written to {path}: {error}; name a file that can be written"
            ) from error
        for number, line in enumerate(lines, start=1):
            if not isinstance(line.get("key"), str):
                raise InputError(
                    f"{path}:{number} is no answer of this command; name a new file, or the one an "
                    "earlier run has left"
                )
        self._keys = {line["key"] for line in lines}

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def write(self, line: dict[str, Any]) -> None:
        """Append one answer."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._keys.add(line["key"])


def _box(box: Box) -> dict[str, Any]:
    record: dict[str, Any] = {
        "kind": str(box.kind),
        "text": box.text,
        "num_tokens": box.num_tokens,
        "first_position": box.first_position,
        "last_position": box.last_position,
        "is_closed": box.is_closed,
    }
    if box.children:
        record["children"] = [_box(child) for child in box.children]
    return record
