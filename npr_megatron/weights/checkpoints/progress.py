"""How far a pass over weights has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of weights."""

    done: int
    total: int


Report = Callable[[Progress], None]
"""Called after each piece."""
