"""Clean up after a private Ray session, however its driver ended. A script; standard library only.

``ray_cluster`` starts it with a pipe as standard input and closes the pipe when the session is
over; the kernel closes it when the driver is killed. Then every process that still has a file of
the session's folder open for writing (each of Ray's does: its log) is killed, and the folder
removed. Who only reads a log is left alone. Without it, Ray would leave two agents for a minute and
the folder for ever.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

_DEADLINE_S = 10.0


def reap(folder: Path, driver: int) -> None:
    """Kill every process but ``driver`` that writes below ``folder``, then remove it."""
    deadline = time.monotonic() + _DEADLINE_S
    while (left := writers(folder) - {driver}) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it ended by itself
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def writers(folder: Path) -> set[int]:
    """Return the processes of this user that have a file below ``folder`` open for writing."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return {pid for pid in pids if _writes_below(pid, f"{folder}/")}


def _writes_below(pid: int, prefix: str) -> bool:
    try:
        descriptors = os.listdir(f"/proc/{pid}/fd")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False  # it ended, or is somebody else's
    return any(_is_written(pid, number, prefix) for number in descriptors)


def _is_written(pid: int, number: str, prefix: str) -> bool:
    try:
        if not os.readlink(f"/proc/{pid}/fd/{number}").startswith(prefix):
            return False
        flags = Path(f"/proc/{pid}/fdinfo/{number}").read_text().split("flags:")[1].split()[0]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False  # closed meanwhile
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY


if __name__ == "__main__":
    sys.stdin.read()  # until the driver closes the pipe or dies
    reap(folder=Path(sys.argv[1]), driver=int(sys.argv[2]))
