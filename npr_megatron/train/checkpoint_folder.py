"""A folder of checkpoints: which one counts, how a new one joins, how old ones go. No torch.

::

    checkpoints/
      latest                 text: step-00000012
      step-00000010/         whole: manifest.json names every file in it
      step-00000012/
      .partial-step-00000014/    being written, or left by a process that died
      .removed-step-00000008/    on its way out

A checkpoint is written under another name, forced to disk and renamed; then ``latest`` is replaced,
then older ones go. Whenever the process dies, ``latest`` names a whole one. What a step folder
holds is never changed: the same step saved again becomes ``step-00000012-2``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from npr_megatron.errors import EnvironmentFault, InputError
from npr_megatron.train.checkpoint_manifest import (
    Manifest,
    missing_files,
    read_manifest,
)
from npr_megatron.weights.durable import force_to_disk

LATEST = "latest"
"""A file whose text names the checkpoint of its folder to go on from."""
_PARTIAL, _REMOVED = ".partial-", ".removed-"
_NAME = re.compile(r"step-(\d+)(?:-(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCheckpoint:
    """A checkpoint with all its files, each of the right size; their bytes are not looked at."""

    path: Path
    manifest: Manifest


def find_checkpoint(folder: str | os.PathLike[str]) -> StoredCheckpoint | None:
    """Return the checkpoint of ``folder`` to go on from; None where none was ever published.

    It is the one that ``latest`` names, or where that one is not whole, the newest that is.

    Raises:
        InputError: there are checkpoints and none is whole; each is named.
    """
    whole, problems = whole_checkpoints(Path(folder))
    if not whole and problems:
        raise nothing_whole(folder, problems)
    return whole[0] if whole else None


def whole_checkpoints(folder: Path) -> tuple[list[StoredCheckpoint], list[str]]:
    """Return the whole checkpoints of ``folder``, the one to prefer first, and what is wrong with
    the others. ``folder`` may be one checkpoint."""
    latest = _latest(folder)
    paths = sorted(_published(folder), key=lambda path: (path.name == latest, _age(path)))[::-1]
    if not paths and (folder / LATEST).exists():
        return [], [f"{folder / LATEST} names {latest}, which is not there"]
    if not paths and _NAME.fullmatch(folder.name) and folder.is_dir():
        paths = [folder]
    whole: list[StoredCheckpoint] = []
    problems: list[str] = []
    for path in paths:
        try:
            manifest = read_manifest(path)
        except InputError as error:
            problems.append(str(error))
            continue
        missing = missing_files(path, manifest)
        problems += missing
        if not missing:
            whole.append(StoredCheckpoint(path=path, manifest=manifest))
    return whole, problems


def nothing_whole(folder: str | os.PathLike[str], problems: Sequence[str]) -> InputError:
    """Return the error for a folder of checkpoints none of which can be read."""
    return InputError(
        f"a checkpoint was to be read from {folder} and none there is whole:\n"
        + "\n".join(problems)
        + "\nbring the files back from a copy, or remove the folder to begin again"
    )


def begin_checkpoint(folder: Path, step: int) -> Path:
    """Return an empty folder to write a checkpoint of ``step`` to; leftovers are removed.

    Raises:
        OSError: it cannot be made.
        EnvironmentFault: the disk has less room than the newest checkpoint takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    whole, _ = whole_checkpoints(folder)
    needed, free = (whole[0].manifest.num_bytes if whole else 0), shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentFault(
            f"the last checkpoint takes {needed} bytes and the disk of {folder} has {free} left"
        )
    partial = folder / f"{_PARTIAL}{_name(step)}"
    partial.mkdir()
    return partial


def publish_checkpoint(partial: Path, step: int, keep_last: int) -> Path:
    """Make a finished checkpoint, forced to disk but for its name, the one to go on from.

    Then remove the others but for the ``keep_last`` - 1 newest before ``step``.
    """
    folder = partial.parent
    force_to_disk(partial)
    published = folder / _free_name(folder, step)
    partial.rename(published)
    force_to_disk(folder)
    pointer = folder / f"{_PARTIAL}{LATEST}"
    pointer.write_text(published.name)
    force_to_disk(pointer)
    pointer.replace(folder / LATEST)
    force_to_disk(folder)
    _retire(folder, published, keep_last)
    return published


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that died have left; nobody may be writing to ``folder``."""
    for pattern in (_PARTIAL, _REMOVED):
        for path in folder.glob(f"{pattern}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _retire(folder: Path, published: Path, keep_last: int) -> None:
    step, _ = _age(published)
    others = sorted((path for path in _published(folder) if path != published), key=_age)
    before = [path for path in others if _age(path)[0] < step]
    kept = before[max(0, len(before) - keep_last + 1) :]
    for path in others:
        if path not in kept:
            removed = folder / f"{_REMOVED}{path.name}"
            with contextlib.suppress(OSError):  # what stays is in nobody's way
                path.rename(removed)  # else half of it would pass for a damaged checkpoint
            shutil.rmtree(removed, ignore_errors=True)


def _published(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]


def _latest(folder: Path) -> str:
    try:
        return (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _age(path: Path) -> tuple[int, int]:
    """Return step and turn of a checkpoint: newer ones are greater."""
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1]), int(match[2] or 1)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _free_name(folder: Path, step: int) -> str:
    turns = [turn for path in _published(folder) for at, turn in (_age(path),) if at == step]
    return _name(step) if not turns else f"{_name(step)}-{max(turns) + 1}"
