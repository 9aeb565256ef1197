"""Random numbers of one name, in order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from npr_megatron.records.randomness import uniforms


def draws(key: int, count: int) -> npt.NDArray[np.float64]:
    """Return the first ``count`` numbers in [0, 1) of the stream keyed by ``key``."""
    return uniforms(np.array([key], dtype=np.uint64), np.arange(count, dtype=np.uint64))
