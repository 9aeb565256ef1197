"""Why SGLang is not here, in the words of its installation."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def absence_of_sglang() -> str:
    """Return the reason to skip what needs SGLang; empty where it is installed."""
    if find_spec("sglang") is not None:
        return ""
    told = Path(sys.prefix) / ".sglang-missing"  # written by tools/setup_sglang
    return told.read_text().strip() if told.exists() else "run tools/setup_sglang to have SGLang"
