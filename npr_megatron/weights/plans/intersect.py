"""Which boxes of one parameter meet which, for all parameters at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npr_megatron.weights.plans.tile_table import Ints, TileTable


@dataclass(frozen=True, slots=True)
class Boxes:
    """Distinct boxes, sorted by parameter and by their first row."""

    parameter: Ints
    num_axes: Ints
    start: Ints
    stop: Ints

    def __len__(self) -> int:
        return len(self.parameter)

    @property
    def first_row(self) -> Ints:
        """Start along the parameter's first axis."""
        return along_rows(self.start, self.num_axes)

    @property
    def last_row(self) -> Ints:
        """Stop along the parameter's first axis."""
        return along_rows(self.stop, self.num_axes)

    @property
    def num_elements(self) -> Ints:
        """Volumes."""
        return (self.stop - self.start).prod(axis=1)


def along_rows(coordinates: Ints, num_axes: Ints) -> Ints:
    """Return the column of right-aligned coordinates that belongs to the first axis."""
    return coordinates[np.arange(len(coordinates)), coordinates.shape[1] - num_axes]


def row_numbers(columns: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Number the distinct rows of ``columns`` in lexicographic order.

    Returns:
        The index of a first row of each number, and the number of each row.
    """
    key = np.zeros(len(columns[0]), np.int64)
    span = 1
    for column in columns:
        low, high = (int(column.min()), int(column.max())) if len(column) else (0, 0)
        if span * (high - low + 1) >= 2**62:
            _, key = np.unique(key, return_inverse=True)
            span = int(key.max()) + 1
        key = key * (high - low + 1) + (column - low)
        span *= high - low + 1
    _, first, number = np.unique(key, return_index=True, return_inverse=True)
    return first.astype(np.int64), number.astype(np.int64)


def distinct_boxes(tiles: TileTable) -> tuple[Boxes, Ints]:
    """Return the distinct boxes of ``tiles`` and for each tile the index of its box."""
    rows = along_rows(tiles.start, tiles.num_axes)
    first, number = row_numbers([tiles.parameter, rows, *tiles.start.T, *tiles.stop.T])
    boxes = Boxes(
        tiles.parameter[first], tiles.num_axes[first], tiles.start[first], tiles.stop[first]
    )
    return boxes, number


def meeting(ones: Boxes, others: Boxes) -> tuple[Ints, Ints]:
    """Return the indices of all pairs that have elements in common, sorted by the second.

    A sweep along the rows: a box can only meet those that begin before it ends, from the first one
    on that reaches, with all before it, beyond its start.
    """
    if not len(ones) or not len(others):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    span = 1 + int(max(ones.last_row.max(), others.last_row.max()))
    starts = ones.parameter * span + ones.first_row
    reach = np.maximum.accumulate(ones.parameter * span + ones.last_row)
    low = np.searchsorted(reach, others.parameter * span + others.first_row, side="right")
    high = np.searchsorted(starts, others.parameter * span + others.last_row, side="left")
    counts = np.maximum(high - low, 0)
    other = np.repeat(np.arange(len(others)), counts)
    one = np.arange(len(other)) + np.repeat(low - (counts.cumsum() - counts), counts)
    meets = np.logical_and(
        ones.start[one] < others.stop[other], others.start[other] < ones.stop[one]
    ).all(axis=1)
    return one[meets], other[meets]


def first_overlap(boxes: Boxes) -> tuple[int, int] | None:
    """Return two boxes of one parameter that overlap without being equal, None without any."""
    one, other = meeting(boxes, boxes)
    wrong = np.flatnonzero(one < other)
    return (int(one[wrong[0]]), int(other[wrong[0]])) if len(wrong) else None
