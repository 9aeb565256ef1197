"""Calls between the processes of a case: one unix socket per process, every wait with a deadline.

A call that is never answered (stopped process) and one to nobody (dead process) are told apart.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from npr_megatron.errors import NprError


class Gone(Exception):
    """Nobody is at the other end, or it went away during the call."""


class Late(Exception):
    """No answer within the time allowed."""


def serve(target: object, address: Path) -> None:
    """Answer calls of ``target``'s methods for ever, each connection in a thread of its own."""
    address.unlink(missing_ok=True)
    beside = address.with_suffix(f".{os.getpid()}")
    with Listener(str(beside), family="AF_UNIX", backlog=64) as listener:
        os.rename(beside, address)  # a caller finds either nobody or somebody who listens
        while True:
            threading.Thread(target=_answer, args=(target, listener.accept()), daemon=True).start()


def _answer(target: object, line: Connection) -> None:
    with line:
        while True:
            try:
                name, arguments = line.recv()
            except (EOFError, ConnectionError):
                return
            try:
                answer = (True, getattr(target, name)(*arguments))
            except NprError as error:
                answer = (False, error)
            try:
                line.send(answer)
            except (BrokenPipeError, ConnectionError):
                return


def call(address: Path, name: str, *arguments: Any, timeout_s: float) -> Any:
    """Return what the method answers; raise the NprError it raises, Gone or Late."""
    deadline = time.monotonic() + timeout_s
    try:
        with Client(str(address), family="AF_UNIX") as line:
            line.send((name, arguments))
            if not line.poll(max(0.0, deadline - time.monotonic())):
                raise Late(f"{address.name} {name}")
            is_answer, answer = line.recv()
    except (OSError, EOFError) as error:
        raise Gone(f"{address.name} {name}: {error}") from error
    if not is_answer:
        raise answer
    return answer


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait for ``condition``; raise Late with ``what`` if it does not come true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise Late(what)
        time.sleep(0.002)
