"""Ctrl-C and SIGTERM end a command with one line and the exit code shells expect (128 + signal)."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer


@contextmanager
def interruptible(remedy: str) -> Iterator[None]:
    """Run the block so that SIGTERM unwinds it like Ctrl-C does, and say ``remedy`` at the end.

    Everything the block opened is closed by its own ``finally`` and ``with`` on the way out; a
    second SIGTERM during that is ignored. Main thread only.
    """
    received = [signal.SIGINT]

    def unwind(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(signal.Signals(number))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    except KeyboardInterrupt:
        number = received[-1]
        print(f"stopped by {number.name}; {remedy}", file=sys.stderr)
        raise typer.Exit(128 + number) from None
    finally:
        signal.signal(signal.SIGTERM, before)
