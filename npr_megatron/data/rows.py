"""Rows of training data from files: JSON lines, Parquet, and folders that HF ``datasets`` saved.

A row that cannot be read becomes a :class:`Fault` in its place and the next one is read, so one
look finds all of them. What the fields mean is ``data.conversations``' business. Only Parquet and
saved datasets need ``pyarrow``.
"""

from __future__ import annotations

import glob
import importlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from npr_megatron.errors import EnvironmentFault, InputError

MAX_LISTED = 20
"""Faults that a message names one by one."""
_BATCH_ROWS = 1024

FaultKind = Literal["corrupt", "malformed", "over_long"]


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in its file."""

    place: str
    """``train.jsonl:17`` (lines from 1), or ``train.parquet[16]`` (rows from 0)."""
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row cannot be learnt from.

    Example: ``Fault("train.jsonl:17", "corrupt", "response is null; it must be text")``
    """

    place: str
    kind: FaultKind
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


def list_faults(faults: Sequence[Fault]) -> list[str]:
    """Return a sentence for each of the first faults, and one that counts the rest."""
    more = len(faults) - MAX_LISTED
    return [*map(str, faults[:MAX_LISTED])] + ([f"and {more} more rows"] if more > 0 else [])


def files_of(pattern: str) -> list[Path]:
    """Return the files and saved datasets that ``pattern`` (a path, or one with ``*``) names.

    Raises:
        InputError: there is none, or one is of no known kind.
    """
    paths = sorted(map(Path, glob.glob(pattern, recursive=True)))
    if not paths:
        raise InputError(f"{pattern} does not exist; give a .jsonl or .parquet file, or a folder")
    for path in paths:
        _require_known(path)
    return paths


def read_rows(path: Path) -> Iterator[Row | Fault]:
    """Yield the rows of one of :func:`files_of`'s paths, in order.

    Raises:
        InputError: the file as a whole cannot be read.
        EnvironmentFault: it needs ``pyarrow``, which is not installed.
    """
    if path.is_dir():
        return _read_saved(path)
    return _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)


def _require_known(path: Path) -> None:
    if path.is_dir():
        if (path / "state.json").is_file():
            return
        splits = sorted(child.name for child in path.iterdir() if (child / "state.json").is_file())
        if splits:
            raise InputError(
                f"{path} is a dataset of several splits, {', '.join(splits)}; name one of them, "
                f"such as {path / splits[0]}"
            )
        raise InputError(
            f"{path} is a folder that datasets.save_to_disk has not written (no state.json); "
            f"name its files, such as {path}/*.parquet"
        )
    if path.suffix not in (".jsonl", ".parquet"):
        raise InputError(
            f"{path} ends in {path.suffix or 'nothing'}; known are .jsonl, .parquet and folders "
            "written by datasets.save_to_disk"
        )


def _read_jsonl(path: Path) -> Iterator[Row | Fault]:
    try:
        with path.open("rb") as file:
            # Bytes are split at newlines only: a text may hold U+2028 and its like unescaped.
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse(f"{path}:{number}", line, is_first=number == 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}; give a JSON-lines file") from error


def _parse(place: str, line: bytes, *, is_first: bool) -> Row | Fault:
    try:
        fields: Any = json.loads(line.decode("utf-8-sig" if is_first else "utf-8"))
    except UnicodeDecodeError as error:
        return Fault(place, "corrupt", f"byte {error.start} is not UTF-8")
    except json.JSONDecodeError as error:
        return Fault(place, "corrupt", f"not JSON ({error.msg} at column {error.colno})")
    except RecursionError:
        return Fault(place, "corrupt", "JSON nested too deeply")
    if not isinstance(fields, dict):
        return Fault(place, "corrupt", f"a JSON {type(fields).__name__}, not an object")
    return Row(place, fields)


def _read_parquet(path: Path) -> Iterator[Row | Fault]:
    arrow = _pyarrow(path)
    read = 0
    try:
        with arrow.parquet.ParquetFile(path) as file:
            for row in _rows_of(path, file.iter_batches(batch_size=_BATCH_ROWS)):
                yield row
                read += 1
    except (arrow.ArrowException, OSError) as error:
        raise InputError(
            f"{path} cannot be read as Parquet from row {read} on: {error}; write it again"
        ) from error


def _read_saved(folder: Path) -> Iterator[Row | Fault]:
    arrow = _pyarrow(folder)
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}/state.json does not list the files of a dataset ({error!r}); save it again "
            "with datasets.save_to_disk"
        ) from error
    first = 0
    for name in names:
        try:
            with arrow.memory_map(str(folder / name)) as source:
                for row in _rows_of(folder, arrow.ipc.open_stream(source), first):
                    yield row
                    first += 1
        except (arrow.ArrowException, OSError) as error:
            raise InputError(
                f"{folder / name} cannot be read as Arrow from row {first} of the dataset on: "
                f"{error}; save the dataset again"
            ) from error


def _rows_of(path: Path, batches: Any, first: int = 0) -> Iterator[Row]:
    for batch in batches:
        for fields in batch.to_pylist():
            yield Row(f"{path}[{first}]", fields)
            first += 1


def _pyarrow(path: Path) -> Any:
    try:
        for name in ("pyarrow.ipc", "pyarrow.parquet"):
            importlib.import_module(name)
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise EnvironmentFault(
            f"{path} is read with pyarrow, which cannot be imported ({error}); install it "
            '(pip install "npr-megatron[data]"), or give a .jsonl file'
        ) from error
