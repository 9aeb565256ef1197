"""Strike a process at the n-th thing it asks of the file system, half-way through if it writes."""

from __future__ import annotations

import builtins
import errno
import io
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

_CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
_FORK = multiprocessing.get_context("fork")


class Strikes:
    """Watches the processes that this one forks; one is struck when it has asked ``at`` times."""

    def __init__(self, *, own: bool = False) -> None:
        """Watch from now on; ``own`` watches this process too."""
        self._watched: Callable[[], bool] = lambda: own or os.getpid() != rank
        rank = os.getpid()
        self._count = _FORK.Value("i", 0)
        self._calls = _FORK.Array("i", 20_000)
        self._at: int | None = None
        self._act: Callable[[], None] = kill_self
        self._torn = True
        self._real_open = builtins.open
        for name in _CALLS:
            setattr(os, name, self._watching(name, getattr(os, name)))
        watching_open: Any = self._open
        builtins.open = io.open = watching_open

    def arm(
        self, at: int | None, act: Callable[[], None] | None = None, *, torn: bool = True
    ) -> None:
        """Count from zero again and strike at operation ``at``, the first being 1; None: only
        count. ``torn``: half of what was to be written gets there."""
        self._count.value, self._at, self._act = 0, at, act or kill_self
        self._torn = torn

    @property
    def count(self) -> int:
        """Operations since :meth:`arm`, of all watched processes."""
        return self._count.value

    @property
    def calls(self) -> list[int]:
        """The operations that were no writes: they change names, or wait for the disk."""
        return [at + 1 for at in range(self.count) if self._calls[at]]

    def tick(self, *, is_call: bool, before: Callable[[], None] = lambda: None) -> None:
        """Count one operation."""
        if not self._watched():
            return
        with self._count.get_lock():
            self._calls[self._count.value] = is_call
            self._count.value += 1
            is_struck = self._count.value == self._at
        if is_struck:
            if self._torn:
                before()
            self._act()

    def _watching(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.tick(is_call=True)
            return real(*args, **kwargs)

        return call

    def _open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" not in mode or not self._watched():
            return self._real_open(file, mode, *args, **kwargs)
        self.tick(is_call=True)
        writer = _Writer(file, self)
        return writer if "b" in mode else io.TextIOWrapper(writer, encoding="utf-8")


class _Writer(io.BufferedWriter):
    def __init__(self, file: Any, strikes: Strikes) -> None:
        super().__init__(io.FileIO(file, "w"))
        self._strikes = strikes

    def write(self, data: Any, /) -> int:
        self._strikes.tick(is_call=False, before=lambda: self._half(data))
        return super().write(data)

    def _half(self, data: Any) -> None:
        super().write(bytes(data)[: len(data) // 2])
        self.flush()


def kill_self() -> None:
    """Die as by ``kill -9``."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_group() -> None:
    """Take every process of the job along: a machine that loses power."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def disk_full() -> None:
    """Fail as a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Gate:
    """What a process waits for at the operation that it is struck at."""

    def __init__(self) -> None:
        self._reached, self._open = _FORK.Event(), _FORK.Event()

    def __call__(self) -> None:
        self._reached.set()
        self._open.wait()

    def wait_until_reached(self) -> None:
        """Wait for the process."""
        assert self._reached.wait(20), "nobody came"

    def open(self) -> None:
        """Let it go on."""
        self._open.set()
