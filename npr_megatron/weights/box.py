"""Axis-aligned boxes of element coordinates: the only geometry resharding needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import add, sub

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """Half-open box ``[start, stop)``; ``Box((2, 0), (4, 8))`` is rows 2 and 3 of 8 columns."""

    start: Index
    stop: Index

    @classmethod
    def at(cls, start: Index, shape: Index) -> Box:
        """Return the box of ``shape`` that begins at ``start``."""
        if len(start) != len(shape):
            raise ValueError(f"a box at {start} cannot have shape {shape}: unequal numbers of axes")
        return cls(start, tuple(map(add, start, shape)))

    @property
    def shape(self) -> Index:
        """Elements along each axis."""
        return tuple(map(sub, self.stop, self.start))

    @property
    def num_elements(self) -> int:
        """Volume."""
        return math.prod(map(sub, self.stop, self.start))

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index expression that selects the box from a tensor."""
        return tuple(map(slice, self.start, self.stop))

    def intersect(self, other: Box) -> Box | None:
        """Return the common part, None where there is none."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if all(a < b for a, b in zip(start, stop, strict=True)):
            return Box(start, stop)
        return None

    def moved(self, from_start: Index, to_start: Index) -> Box:
        """Return the box as seen after a move of its surroundings from one origin to another."""
        shift = tuple(b - a for a, b in zip(from_start, to_start, strict=True))
        return Box(tuple(map(add, self.start, shift)), tuple(map(add, self.stop, shift)))
