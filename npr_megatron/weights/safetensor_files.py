"""The safetensors files of a folder, opened together and checked before anything is read.

A folder holds ``model.safetensors``, or an index that names the file of each tensor. A download cut
short is found here, with the tensors it lost, and not in the middle of loading.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from npr_megatron.errors import InputError
from npr_megatron.weights.box import Box, Index

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class OpenTensors:
    """Tensors of a folder by name; close it when done."""

    def __init__(self, files: ExitStack, owners: Mapping[str, Any]) -> None:
        self._files = files
        self._owners = owners

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._owners)

    def shape(self, name: str) -> Index:
        """Return the shape of a tensor, from its file's header."""
        return tuple(self._owners[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor in the words of safetensors: ``F32``, ``BF16``, ..."""
        return self._owners[name].get_slice(name).get_dtype()

    def read(self, name: str, box: Box) -> Tensor:
        """Return ``tensor[box]`` in the dtype of the file; touches only those bytes."""
        return self._owners[name].get_slice(name)[box.slices]

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def open_tensors(folder: str | Path) -> OpenTensors:
    """Open all tensors of ``folder``.

    Raises:
        InputError: a file is missing, cut short or broken, a tensor is not in the file that the
            index names, or is in two; the message lists all.
    """
    folder = Path(folder)
    named = _named_files(folder)
    owners: dict[str, Any] = {}
    problems: list[str] = []
    with ExitStack() as files:
        for file, announced in named.items():
            try:
                opened = files.enter_context(safe_open(file, framework="pt"))
            except (OSError, SafetensorError) as error:
                problems.append(_diagnosis(file, announced) or f"{file.name}: {error}")
                continue
            held = set(opened.keys())
            problems += [
                f"{name} is in two files, one is {file.name}" for name in held & owners.keys()
            ]
            problems += [
                f"{file.name} lacks {name}, which {INDEX} says it holds"
                for name in set(announced) - held
            ]
            owners |= dict.fromkeys(held, opened)
        if problems:
            raise InputError(
                f"{folder}: weights cannot be read, download them again:\n"
                + "\n".join(sorted(problems))
            )
        return OpenTensors(files.pop_all(), owners)


def _named_files(folder: Path) -> dict[Path, list[str]]:
    """Return every file with the tensors that the index says it holds."""
    index = folder / INDEX
    if not index.exists():
        return {folder / SINGLE_FILE: []}
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, list[str]] = {}
        for name, file in sorted(weight_map.items()):
            files.setdefault(folder / file, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index} was to name the file of each tensor and cannot be read "
            f"({type(error).__name__}: {error}); download it again"
        ) from error
    return files


def _diagnosis(file: Path, announced: list[str]) -> str | None:
    """Return what is missing of a file that cannot be opened; None if that is not the reason."""
    if not file.exists():
        held = [f"; it holds {len(announced)} tensors, the first is {name}" for name in announced]
        return f"{file.name} is missing{''.join(held[:1])}"
    size = file.stat().st_size
    with file.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(header_bytes, size))
    try:
        ends = _ends(json.loads(header))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    start = 8 + header_bytes
    expected = start + max(ends.values(), default=0)
    lost = [name for name, end in sorted(ends.items(), key=lambda it: it[1]) if start + end > size]
    named = f"; {len(lost)} of its tensors are cut off, the first is {lost[0]}" if lost else ""
    return f"{file.name} has {size} bytes, its header announces {expected}{named}"


def _ends(header: dict[str, Any]) -> dict[str, int]:
    """Return where each tensor ends, in bytes after the header."""
    return {
        name: int(entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }
