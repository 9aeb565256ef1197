"""Metrics as JSON lines: one line per stage and step, appended and flushed, readable while a run
goes on.

A line is ``{"stage": "zero", "step": 12, "time_s": 1763.2, "train/loss": 0.31, ...}``. Names are
``area/thing_unit``. A step that is repeated after a restart is written again; readers keep the last
line. Numbers that are not finite are written as null, since JSON has no word for them.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npr_megatron.errors import InputError

_NAME = re.compile(r"[a-z0-9_]+/[A-Za-z0-9_]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsLine:
    """What was measured in one step of one stage.

    Example::

        MetricsLine(stage="zero", step=12, time_s=1763.2, values={"train/loss": 0.31})
    """

    stage: str
    step: int
    """Optimizer step inside the stage, from 1."""
    time_s: float
    """Unix time at which the step ended [s]."""
    values: dict[str, float]


class MetricsLog:
    """Appends to a metrics file. A line cut off by a killed process is removed on opening.

    The file is opened for each line, so it may be rewritten (cut back on resume) between two of
    them.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        drop_unfinished_line(self._path)

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Append one line and hand it to the operating system.

        Raises:
            ValueError: a name is not of the form ``area/thing_unit``.
        """
        for name in values:
            if not _NAME.fullmatch(name):
                raise ValueError(f"metric {name!r} is not named area/thing_unit; rename it")
        finite = {name: _finite_or_none(value) for name, value in values.items()}
        line = {"stage": stage, "step": step, "time_s": round(time.time(), 3), **finite}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: str | Path) -> list[MetricsLine]:
    """Return the lines of a metrics file, the last one of each (stage, step), in order of first
    writing.

    Null becomes NaN. An unfinished last line is left out: its writer may still be at work.
    """
    lines: dict[tuple[str, int], MetricsLine] = {}
    for record in read_json_lines(path):
        stage, step = str(record.pop("stage")), int(record.pop("step"))
        time_s = float(record.pop("time_s"))
        values = {n: math.nan if value is None else float(value) for n, value in record.items()}
        lines[stage, step] = MetricsLine(stage=stage, step=step, time_s=time_s, values=values)
    return list(lines.values())


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, without an unfinished last line.

    Raises:
        InputError: the file is missing, or a finished line is not a JSON object.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; name a run that has started") from None
    finished = text[: text.rfind("\n") + 1]
    records: list[dict[str, Any]] = []
    for number, line in enumerate(finished.splitlines(), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} is not JSON ({error}); remove that line") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}:{number} is not a JSON object; remove that line")
        records.append(record)
    return records


def _finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def drop_unfinished_line(path: Path) -> None:
    """Cut off what a killed process has left of a last line; nothing where there is no file."""
    if not path.exists():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
