"""What a plan consists of: one box of a source storage that becomes a box of a target storage."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from npr_megatron.weights.box import Box, Index
from npr_megatron.weights.tiles import PinnedDtype, spread

PINNED_BYTES: dict[PinnedDtype, int] = {"fp32": 4, "fp8_e4m3": 1}
"""Bytes of one element of a storage with a pinned dtype."""


def element_bytes(dtype: PinnedDtype | None, weight_bytes: int) -> int:
    """Return the bytes of one element where an element of the weights takes ``weight_bytes``."""
    return weight_bytes if dtype is None else PINNED_BYTES[dtype]


@dataclass(frozen=True, slots=True, order=True)
class Copy:
    """``target[target_start : + shape] = source[source_start : + shape]``.

    ``shape`` has the axes of the parameter; those that a storage has beyond them come first, with
    extent 1.
    """

    target_rank: int
    target_storage: str
    target_start: Index
    source_rank: int
    source_storage: str
    source_start: Index
    shape: Index
    dtype: PinnedDtype | None = None
    """That of both storages; None: that of the weights."""

    @property
    def source_box(self) -> Box:
        """What is read."""
        return Box.at(self.source_start, spread(self.shape, len(self.source_start)))

    @property
    def target_box(self) -> Box:
        """What is written."""
        return Box.at(self.target_start, spread(self.shape, len(self.target_start)))

    @property
    def num_elements(self) -> int:
        """Elements moved."""
        return math.prod(self.shape)

    def rows(self, start: int, stop: int) -> Copy:
        """Return the part that moves rows ``[start, stop)`` of the box."""
        return replace(
            self,
            target_start=_below(self.target_start, len(self.shape), start),
            source_start=_below(self.source_start, len(self.shape), start),
            shape=(stop - start, *self.shape[1:]),
        )


def _below(start: Index, num_axes: int, num_rows: int) -> Index:
    """Return what lies ``num_rows`` below ``start`` in a parameter of ``num_axes`` axes."""
    axis = len(start) - num_axes
    return (*start[:axis], start[axis] + num_rows, *start[axis + 1 :])
