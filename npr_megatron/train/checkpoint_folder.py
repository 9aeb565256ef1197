"""Which checkpoint of a folder counts. No torch: the driver looks here before it starts."""

from __future__ import annotations

import os
from pathlib import Path

LATEST = "latest"
"""A file whose text names the newest complete checkpoint of its folder."""


def find_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest complete checkpoint of ``folder``; None where there is none yet."""
    latest = Path(folder) / LATEST
    return Path(folder) / latest.read_text().strip() if latest.exists() else None
