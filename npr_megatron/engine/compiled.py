"""How loops are compiled: by numba, for the CPU at hand.

Compiling takes a second per function, once per machine: results are kept beside the sources, in the
home directory, or in ``NUMBA_CACHE_DIR``. Compilers may reorder sums but not assume that all is
finite: NaN stays NaN, which is how the engine finds broken weights. Indices are not checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

_OPTIONS = {"fastmath": {"reassoc", "contract", "arcp", "nsz", "afn"}, "error_model": "numpy"}


def compiled(function: Callable[..., Any]) -> Any:
    """Decorate a function that Python calls; it lets other threads run."""
    try:
        return numba.njit(function, cache=True, nogil=True, **_OPTIONS)
    except RuntimeError:  # nowhere to keep it: this process compiles for itself
        return numba.njit(function, nogil=True, **_OPTIONS)


def inlined(function: Callable[..., Any]) -> Any:
    """Decorate a part of compiled functions."""
    return numba.njit(function, inline="always", **_OPTIONS)
