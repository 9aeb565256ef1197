"""Set up logging once per process: one stamped line per event, into a file, warnings also to the
terminal.

Library code says ``logging.getLogger(__name__)`` and nothing else; only the entry of a process
calls this.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

_ROOT = "npr_megatron"
_FORMAT = "%(asctime)s %(levelname)-7s {role}: %(message)s  [%(name)s:%(lineno)d]"


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at that moment, so a live display can put lines above
    itself."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def set_up_logging(role: str, *, path: str | Path | None = None, level: int = logging.INFO) -> None:
    """Send this package's log records to ``path`` and those from warning upwards to the terminal.

    Calling it again replaces what the last call set up. Other packages' loggers are left alone.

    Args:
        role: who writes, such as ``driver`` or ``trainer 3``; stamped on every line.
        path: file to append to; None logs to the terminal only.
        level: least severe level that reaches the file.
    """
    logger = logging.getLogger(_ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    formatter = logging.Formatter(_FORMAT.format(role=role.replace("%", "%%")), "%Y-%m-%d %H:%M:%S")
    terminal = _CurrentStderr()
    terminal.setLevel(logging.WARNING)
    handlers: list[logging.Handler] = [terminal]
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(path, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
