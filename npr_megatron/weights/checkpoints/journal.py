"""What an interrupted conversion has finished, so that the next start continues there.

Beside the target stand a partial folder and a journal, both hidden::

    .<target>.partial/        finished parts, and at most one torn file
    .<target>.partial.jsonl   what is being converted, then a line per finished part

A line is written when the file it names is on disk. Lines are trusted only if the file still has
the recorded size and checksum. The journal is locked by the process that converts: one at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from npr_megatron.errors import EnvironmentFault
from npr_megatron.weights.box import Box
from npr_megatron.weights.checkpoints.parts import WrittenPart, crc32_of
from npr_megatron.weights.checkpoints.torch_dist_files import WrittenEntry


class Journal:
    """The open journal of one conversion. Use as a context manager."""

    def __init__(self, target: Path, conversion: str) -> None:
        """Open or begin the journal of ``conversion`` (a hash of what is asked for).

        What another conversion left behind under this target's name is deleted.

        Raises:
            EnvironmentFault: another process converts to this target, or it cannot be written.
        """
        self.folder = target.with_name(f".{target.name}.partial")
        self._path = target.with_name(f".{target.name}.partial.jsonl")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EnvironmentFault(
                f"another process is converting to {target}; wait for it or choose another target"
            ) from error
        except OSError as error:
            raise EnvironmentFault(
                f"{target.parent} cannot be written to ({error}); choose another target"
            ) from error
        lines = self._read()
        if not lines or lines[0] != {"conversion": conversion}:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.ftruncate(self._descriptor, 0)
            lines = [{"conversion": conversion}]
            self._append(lines[0])
        self.folder.mkdir(exist_ok=True)
        recorded = {part.file: part for part in map(_part_of, lines[1:])}
        self.finished = {
            file: part for file, part in recorded.items() if _is_whole(self.folder, part)
        }

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)

    def finish(self, part: WrittenPart) -> None:
        """Record a part whose file is on disk."""
        self._append(_line_of(part))
        self.finished[part.file] = part

    def remove(self) -> None:
        """Delete the journal of a conversion that is complete."""
        self._path.unlink()

    def _read(self) -> list[dict[str, Any]]:
        """Return the lines, and cut off the torn one that a kill may have left."""
        lines: list[dict[str, Any]] = []
        size = 0
        for line in self._path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
            size += len(line)
        os.ftruncate(self._descriptor, size)
        return lines

    def _append(self, line: dict[str, Any]) -> None:
        os.lseek(self._descriptor, 0, os.SEEK_END)
        left = json.dumps(line).encode() + b"\n"
        while left:
            left = left[os.write(self._descriptor, left) :]
        os.fsync(self._descriptor)


def _is_whole(folder: Path, part: WrittenPart) -> bool:
    path = folder / part.file
    return path.exists() and path.stat().st_size == part.num_bytes and crc32_of(path) == part.crc32


def _line_of(part: WrittenPart) -> dict[str, Any]:
    return {
        "file": part.file,
        "bytes": part.num_bytes,
        "crc32": part.crc32,
        "entries": [
            [entry.key, entry.box and [entry.box.start, entry.box.stop], entry.offset, entry.length]
            for entry in part.entries
        ],
    }


def _part_of(line: dict[str, Any]) -> WrittenPart:
    file = line["file"]
    entries = tuple(
        WrittenEntry(key, box and Box(tuple(box[0]), tuple(box[1])), file, offset, length)
        for key, box, offset, length in line["entries"]
    )
    return WrittenPart(file, line["bytes"], line["crc32"], entries)
