"""A file of shared memory through which one source rank publishes its storages.

Two slots alternate, so version v stays readable while v + 1 is written (``executors.slots``). The
whole file is reserved when it is created: later writes cannot fail for lack of memory. Its owner
holds a lock on it while it lives; an arena that nobody has locked is garbage and may be replaced.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from npr_megatron.errors import EnvironmentFault, InputError, StaleWeightsError
from npr_megatron.weights.executors.slots import Slots, slot_bytes
from npr_megatron.weights.tiles import RankLayout

NUM_SLOTS = 2
_RUN_ID = re.compile(r"[A-Za-z0-9._-]+")


def arena_bytes(rank_layout: RankLayout, dtype: torch.dtype) -> int:
    """Return the bytes of shared memory that one source rank's arena takes."""
    return NUM_SLOTS * slot_bytes(rank_layout, dtype)


def arena_path(arena_dir: str | Path, run_id: str, rank: int) -> Path:
    """Return where rank ``rank`` of run ``run_id`` publishes."""
    return Path(arena_dir) / f"npr-{_checked(run_id)}-rank{rank:05d}.arena"


def remove_arenas(arena_dir: str | Path, run_id: str) -> int:
    """Delete what killed processes of a run left behind; return the number of files."""
    pattern = re.compile(rf"npr-{re.escape(_checked(run_id))}-rank\d{{5}}\.arena")
    left = [path for path in Path(arena_dir).iterdir() if pattern.fullmatch(path.name)]
    return sum(_remove_if_dead(path) for path in left)


def sweep_dead_arenas(arena_dir: str | Path) -> int:
    """Delete the arenas of all runs whose processes are gone; return the number of files.

    A killed run cannot clean up after itself; the next run of any name does it.
    """
    pattern = re.compile(rf"npr-{_RUN_ID.pattern}-rank\d{{5}}\.arena")
    found = [path for path in Path(arena_dir).iterdir() if pattern.fullmatch(path.name)]
    return sum(_remove_if_dead(path) for path in found)


class Arena:
    """A mapped arena, as readers see it. Their mapping is private: they cannot write."""

    def __init__(self, path: str | Path, rank_layout: RankLayout, dtype: torch.dtype) -> None:
        """Map an existing arena.

        Raises:
            StaleWeightsError: it is gone, or was made for another layout or dtype.
        """
        size = arena_bytes(rank_layout, dtype)
        try:
            with Path(path).open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size == size:
                    # Copy-on-write maps the same pages as long as nobody writes through it.
                    mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
                    self.slots = Slots(_memory(mapping), rank_layout, dtype)
                    self._inode = status.st_ino
                    return
        except OSError as error:
            raise StaleWeightsError(
                f"arena {path} cannot be read ({error}); its owner is gone, publish again"
            ) from error
        raise StaleWeightsError(
            f"arena {path} has {status.st_size} bytes, its layout in {dtype} takes {size}; "
            "read it with the layout and dtype of its publication"
        )

    def is_at(self, path: str | Path) -> bool:
        """Return whether the mapped file is still the one at ``path``.

        A replacement has another inode: the mapping keeps the old one from being reused.
        """
        try:
            return os.stat(path).st_ino == self._inode
        except FileNotFoundError:
            return False


class OwnedArena:
    """The arena of a source rank: created by it, written by it, deleted by ``close``."""

    def __init__(self, path: Path, rank_layout: RankLayout, dtype: torch.dtype) -> None:
        """Reserve the memory and map it; replaces an arena whose owner is dead.

        Raises:
            EnvironmentFault: no room, no such folder, or a living process owns this arena.
        """
        self.path = path
        size = arena_bytes(rank_layout, dtype)
        self._lock = _reserve(path, size)
        mapping = mmap.mmap(self._lock, size, access=mmap.ACCESS_WRITE)
        self.slots = Slots(_memory(mapping), rank_layout, dtype)

    def close(self) -> None:
        """Delete the file. The memory is freed when the last reader drops its mapping."""
        if self._lock >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1


def _memory(mapping: mmap.mmap) -> Tensor:
    return torch.frombuffer(mapping, dtype=torch.uint8)


def _checked(run_id: str) -> str:
    if not _RUN_ID.fullmatch(run_id):
        raise InputError(
            f"run id {run_id!r} becomes part of a file name; use letters, digits, '.', '_', '-'"
        )
    return run_id


def _reserve(path: Path, size: int) -> int:
    """Create, lock and fill the file with reserved memory; return its open descriptor.

    Without the reservation a full tmpfs shows up as SIGBUS in the middle of a copy.
    """
    try:
        _remove_if_dead(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise EnvironmentFault(
            f"arena {path} belongs to a living process; another run has the same name, "
            "stop it or rename this one"
        ) from error
    except OSError as error:
        raise EnvironmentFault(
            f"arena {path} cannot be created ({error}); set cluster.arena_dir to a writable "
            "memory-backed folder"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        room = os.statvfs(path.parent)
        path.unlink()
        os.close(descriptor)
        raise EnvironmentFault(
            f"arena {path} needs {size} bytes, {path.parent} has "
            f"{room.f_bavail * room.f_frsize} free ({error}); free memory there, enlarge it or "
            "set cluster.arena_dir"
        ) from error
    return descriptor


def _remove_if_dead(path: Path) -> bool:
    """Delete the arena at ``path`` unless its owner lives; return whether it was deleted."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
