"""What ``npr serve`` is asked for. No torch, so that the command line can say it at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from npr_megatron.config.engine import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOrder:
    """A model, the engine to run it, and where to serve it."""

    model_folder: Path
    """HF folder with tokenizer."""
    name: str
    """What clients call it."""
    engine: EngineConfig
    device: str | None
    """``cpu``, ``cuda`` or ``cuda:1``; None takes CUDA where there is some."""
    host: str
    port: int
    """0 takes a free one."""
    max_waiting: int
    """Answers that may wait while ``engine.max_running`` are decoded."""
    drain_s: float
    """How long answers under way may go on when the server is told to stop."""
