"""Many copies as columns of integers; ``Copy`` objects are made of rows when asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from npr_megatron.weights.plans.copies import Copy, element_bytes
from npr_megatron.weights.plans.intersect import along_rows, row_numbers
from npr_megatron.weights.plans.tile_table import PINNED_DTYPES, Ints, right_aligned


@dataclass(frozen=True, slots=True, eq=False)
class CopyTable:
    """One row per copy; coordinates [n, axes] are aligned to the right (see ``tile_table``)."""

    target_names: tuple[str, ...]
    """Storage names by number."""
    source_names: tuple[str, ...]
    target_rank: Ints
    target_storage: Ints
    target_axes: Ints
    """Axes of the storage."""
    target_start: Ints
    source_rank: Ints
    source_storage: Ints
    source_axes: Ints
    source_start: Ints
    shape: Ints
    num_axes: Ints
    """Axes of the parameter."""
    dtype: Ints

    @classmethod
    def of(cls, copies: Sequence[Copy]) -> CopyTable:
        """Return the rows of ``copies``, in their order."""
        target_names = sorted({copy.target_storage for copy in copies})
        source_names = sorted({copy.source_storage for copy in copies})
        width = max((len(c.target_start) + len(c.source_start) for c in copies), default=1)
        target_start, target_axes = right_aligned([c.target_start for c in copies], width, 0)
        source_start, source_axes = right_aligned([c.source_start for c in copies], width, 0)
        shape, num_axes = right_aligned([c.shape for c in copies], width, 1)
        return cls(
            target_names=tuple(target_names),
            source_names=tuple(source_names),
            target_rank=_column([c.target_rank for c in copies]),
            target_storage=_column([target_names.index(c.target_storage) for c in copies]),
            target_axes=target_axes,
            target_start=target_start,
            source_rank=_column([c.source_rank for c in copies]),
            source_storage=_column([source_names.index(c.source_storage) for c in copies]),
            source_axes=source_axes,
            source_start=source_start,
            shape=shape,
            num_axes=num_axes,
            dtype=_column([PINNED_DTYPES.index(c.dtype) for c in copies]),
        )

    def __len__(self) -> int:
        return len(self.target_rank)

    @property
    def num_elements(self) -> Ints:
        """Elements of each copy."""
        return self.shape.prod(axis=1)

    def num_bytes(self, weight_bytes: int) -> Ints:
        """Return the bytes of each copy where an element of the weights has ``weight_bytes``."""
        sizes = [element_bytes(dtype, weight_bytes) for dtype in PINNED_DTYPES]
        return self.num_elements * np.array(sizes, np.int64)[self.dtype]

    def take(self, rows: Ints) -> CopyTable:
        """Return some rows, in the order asked for."""
        columns = {name: getattr(self, name)[rows] for name in _COLUMNS}
        return replace(self, **columns)

    def copies(self) -> tuple[Copy, ...]:
        """Return all rows as objects."""
        return tuple(
            Copy(
                target_rank=target_rank,
                target_storage=self.target_names[target_storage],
                target_start=tuple(target_start[len(target_start) - target_axes :]),
                source_rank=source_rank,
                source_storage=self.source_names[source_storage],
                source_start=tuple(source_start[len(source_start) - source_axes :]),
                shape=tuple(shape[len(shape) - num_axes :]),
                dtype=PINNED_DTYPES[dtype],
            )
            for (
                target_rank,
                target_storage,
                target_axes,
                target_start,
                source_rank,
                source_storage,
                source_axes,
                source_start,
                shape,
                num_axes,
                dtype,
            ) in zip(*(getattr(self, name).tolist() for name in _COLUMNS), strict=True)
        )

    def digest(self) -> str:
        """Return the SHA-256 of names and numbers (64 hexadecimal digits)."""
        content = hashlib.sha256(repr((self.target_names, self.source_names)).encode())
        for name in _COLUMNS:
            column = np.ascontiguousarray(getattr(self, name), "<i8")
            content.update(repr(column.shape).encode())
            content.update(column.data)
        return content.hexdigest()

    def joined(self) -> CopyTable:
        """Join copies that continue each other downwards on both sides; sort all by target."""
        down = self.target_start.shape[1] - self.num_axes
        at_rows = np.arange(self.target_start.shape[1]) == down[:, None]
        row = along_rows(self.target_start, self.num_axes)
        height = along_rows(self.shape, self.num_axes)
        beside = [
            *(getattr(self, name) for name in ("target_rank", "target_storage", "source_rank")),
            *(self.source_storage, self.num_axes),
            *np.where(at_rows, 0, self.target_start).T,
            *np.where(at_rows, 0, self.source_start).T,
            *np.where(at_rows, 0, self.shape).T,
            along_rows(self.source_start, self.num_axes) - row,
        ]
        _, column = row_numbers(beside)
        order = np.lexsort((row, column))
        column, row, height = column[order], row[order], height[order]
        starts = np.append(True, (np.diff(column) != 0) | (row[1:] != row[:-1] + height[:-1]))
        first = np.flatnonzero(starts[: len(order)])
        kept = self.take(order[first])
        shape = kept.shape.copy()
        if len(first):
            shape[at_rows[order[first]]] = np.add.reduceat(height, first)
        return replace(kept, shape=shape)._sorted()

    def _sorted(self) -> CopyTable:
        start = self.target_start.T[::-1]
        return self.take(np.lexsort((*start, self.target_storage, self.target_rank)))


_COLUMNS = tuple(field.name for field in fields(CopyTable) if not field.name.endswith("_names"))


def _column(values: Sequence[int]) -> Ints:
    return np.array(values, np.int64)
