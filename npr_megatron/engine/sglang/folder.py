"""The temporary folder of one engine: what SGLang reads the model's shape from, and its log.

As with arenas, the owner holds a lock while it lives, and the kernel ends the lock however it ends:
a folder that nobody has locked is garbage. An owner that is killed cannot remove its own, so the
next engine of this machine does, and with it what the folder links to: files that SGLang leaves
elsewhere, however it ends. Memory that we share (``weights.shared_bytes``) has no name and needs
none of this.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "npr-sglang-"


class EngineFolder:
    """A new folder of this process; garbage of others is removed first."""

    def __init__(self) -> None:
        remove_dead_folders()
        self.path, self._lock = _created()

    def close(self) -> None:
        """Remove it with all that is in it; safe to call twice."""
        if self._lock >= 0:
            _remove(self.path)
            os.close(self._lock)
            self._lock = -1


def remove_together(folder: Path, file: Path) -> None:
    """Have ``file`` removed when ``folder`` is."""
    (folder / file.name).symlink_to(file)


def remove_dead_folders() -> int:
    """Remove the folders of engines whose owners are gone; return how many there were."""
    return sum(_remove_if_dead(path) for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"))


def _created() -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)
        # Another engine began at this moment, and took it for garbage.


def _remove(path: Path) -> None:
    for entry in path.glob("*"):
        if entry.is_symlink():
            entry.readlink().unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)  # SGLang may be writing its last words


def _remove_if_dead(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False  # somebody else's, or just removed
    try:
        if os.fstat(lock).st_uid != os.getuid():
            return False
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return not path.exists()
