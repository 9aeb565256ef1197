"""Which tokens of a row each context-parallel rank holds. Pure numpy.

A row is cut into 2 * size slices; rank r holds slice r and slice 2 * size - 1 - r. Later tokens see
more of the row than earlier ones, and so every rank has equally much to attend to.
"""

from __future__ import annotations

import numpy as np

from npr_megatron.records.trajectory import IntArray


def own_slices(length: int, rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """Return from where to where in a row of ``length`` tokens those of ``rank`` stand, in order.

    Example:
        8 tokens, rank 0 of 2: (0, 2) and (6, 8).
    """
    if size == 1:
        return ((0, length),)
    width, rest = divmod(length, 2 * size)
    assert rest == 0, "rows are padded to a multiple of their slices"
    return tuple((width * part, width * (part + 1)) for part in (rank, 2 * size - 1 - rank))


def own_columns(length: int, rank: int, size: int) -> IntArray:
    """Return the offsets in a row of ``length`` tokens that ``rank`` holds, in its order.

    Example:
        8 tokens, rank 0 of 2: 0, 1, 6, 7; rank 1 holds 2, 3, 4, 5.
    """
    slices = own_slices(length, rank, size)
    return np.concatenate([np.arange(*part, dtype=np.int32) for part in slices])


def gathered_columns(length: int, size: int) -> IntArray:
    """Return the offsets of a row's tokens as they lie when all ranks put theirs together."""
    return np.concatenate([own_columns(length, rank, size) for rank in range(size)])
