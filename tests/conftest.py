"""What holds for every test."""

from __future__ import annotations

import signal

# Started in the background of a shell, this process ignores interrupts, and so would all that tests
# start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
