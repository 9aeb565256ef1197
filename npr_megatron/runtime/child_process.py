"""What a process forked from a rank does first: the end of the rank shows, and is its own end."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import stat
import threading
import time


def leave_rank(parent: int) -> None:
    """Be a process of its own: deaf to Ctrl-C, without the sockets by which others notice the
    rank's end, and gone when the rank is.

    Args:
        parent: process id of the rank.
    """
    gc.disable()  # what it would free belongs to the rank, on a device perhaps
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        with contextlib.suppress(OSError):  # the one that the list was read through
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.close(descriptor)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)
