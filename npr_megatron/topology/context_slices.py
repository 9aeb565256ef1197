"""Which tokens of a row each context-parallel rank holds. Pure numpy.

A row is cut into 2 * size slices; rank r holds slice r and slice 2 * size - 1 - r. Later tokens see
more of the row than earlier ones, and so every rank has equally much to attend to.
"""

from __future__ import annotations

import numpy as np

from npr_megatron.records.trajectory import IntArray


def own_columns(length: int, rank: int, size: int) -> IntArray:
    """Return the offsets in a row of ``length`` tokens that ``rank`` holds, in its order.

    Example:
        8 tokens, rank 0 of 2: 0, 1, 6, 7; rank 1 holds 2, 3, 4, 5.
    """
    columns = np.arange(length, dtype=np.int32)
    if size == 1:
        return columns
    slices = columns.reshape(2 * size, -1)
    return np.concatenate((slices[rank], slices[-1 - rank]))


def gathered_columns(length: int, size: int) -> IntArray:
    """Return the offsets of a row's tokens as they lie when all ranks put theirs together."""
    return np.concatenate([own_columns(length, rank, size) for rank in range(size)])
