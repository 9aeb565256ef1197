"""Memory of the host for tensors of a step: freed by one step, wanted again by the next.

glibc hands large blocks back to the kernel when they are freed and takes them anew, zeroed page by
page, when they are allocated. A decode step on a CPU allocates the keys it gathers in every layer,
so that takes a third of its time (32 streams, 128 channels).
"""

from __future__ import annotations

import ctypes
from functools import cache

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_KEPT = 32 << 20
"""Blocks up to this size come from the heap; glibc takes no more."""
_KEPT_IN_ALL = 256 << 20
"""Freed memory at the end of the heap that stays with the process."""


@cache
def keep_freed_memory() -> None:
    """Let this process keep up to 256 MiB that it has freed. Does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_IN_ALL)
