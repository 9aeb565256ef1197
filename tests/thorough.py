"""How much of a large sample every run of the tests sees, and how much a thorough one."""

from __future__ import annotations

import pytest


def parts(num_parts: int, num_usual: int) -> list[object]:
    """Return the numbers of the parts of a sample as parameters; those behind the first
    ``num_usual`` are for ``--thorough``."""
    return [
        number if number < num_usual else pytest.param(number, marks=pytest.mark.thorough)
        for number in range(num_parts)
    ]
