"""How loops are compiled: by numba, for the CPU at hand.

Compiling takes a second per function, once per machine: results are cached beside the sources or in
``NUMBA_CACHE_DIR``. Compilers may reorder sums but not assume that all is finite: NaN stays NaN,
which is how the engine finds broken weights.
"""

from __future__ import annotations

from typing import Any

import numba

_REORDER = {"reassoc", "contract", "arcp", "nsz", "afn"}

compiled: Any = numba.njit(fastmath=_REORDER, cache=True, nogil=True, error_model="numpy")
"""Decorates a function that Python calls."""
inlined: Any = numba.njit(fastmath=_REORDER, inline="always", error_model="numpy")
"""Decorates a part of compiled functions."""
