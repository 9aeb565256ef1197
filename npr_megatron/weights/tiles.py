"""What a layout consists of: storages, tiles, ranks, and the few ways weights are cut and stacked.

A tile says that a box of a canonical (HF) parameter fills a box of the same shape of a storage; a
storage may have leading axes that the parameter has not (stacked experts). All layouts are
permutations plus replicas plus padding, so tiles say everything: what no tile covers is padding.
Invariants, relied upon by planner and digest: the distinct boxes of one parameter are disjoint and
cover it; equal boxes are replicas. Imports no torch and touches no process group.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from npr_megatron.weights.box import Box, Index

PinnedDtype = Literal["fp32", "fp8_e4m3"]
"""A dtype that a storage has whatever the dtype of the weights."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A tensor that a rank holds."""

    name: str
    shape: Index
    dtype: PinnedDtype | None = None
    """None: that of the weights, chosen by whoever allocates them."""


@dataclass(frozen=True, slots=True)
class Tile:
    """``storage[at : at + box.shape]`` holds ``parameter[box]``.

    ``at`` has the axes of the storage; those it has beyond the parameter's come first, with
    extent 1.
    """

    parameter: str
    box: Box
    storage: str
    at: Index

    @property
    def storage_box(self) -> Box:
        """The box inside the storage."""
        return Box.at(self.at, spread(self.box.shape, len(self.at)))


@dataclass(frozen=True, slots=True)
class RankLayout:
    """Everything one rank holds."""

    storages: tuple[Storage, ...]
    tiles: tuple[Tile, ...]

    @property
    def num_elements(self) -> int:
        """Elements of all storages."""
        return sum(math.prod(storage.shape) for storage in self.storages)


@dataclass(frozen=True)
class Layout:
    """All ranks that together hold a model, perhaps several times over."""

    kind: str
    """``trainer``, ``engine`` or ``canonical``; for messages."""
    ranks: tuple[RankLayout, ...]

    @cached_property
    def layout_id(self) -> str:
        """SHA-256 of the whole declaration (64 hexadecimal digits)."""
        return hashlib.sha256(repr((self.kind, self.ranks)).encode()).hexdigest()


def spread(shape: Index, num_axes: int) -> Index:
    """Return ``shape`` with leading axes of extent 1, ``num_axes`` in all."""
    return (1,) * (num_axes - len(shape)) + shape


Piece = tuple[Storage, tuple[Tile, ...]]
"""One storage with the tiles that fill it."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of a parameter."""

    parameter: str
    start: int
    stop: int

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.stop - self.start


def rank_of(pieces: Sequence[Piece]) -> RankLayout:
    """Return the rank that holds ``pieces``."""
    return RankLayout(
        tuple(storage for storage, _ in pieces),
        tuple(tile for _, tiles in pieces for tile in tiles),
    )


def whole(storage: str, parameter: str, shape: Index) -> Piece:
    """Return a storage that is a parameter."""
    origin = (0,) * len(shape)
    return Storage(storage, shape), (Tile(parameter, Box(origin, shape), storage, origin),)


def stack(storage: str, segments: Sequence[Rows], width: int) -> Piece:
    """Return a storage of full-width row segments, on top of each other."""
    tiles: list[Tile] = []
    row = 0
    for rows in segments:
        box = Box((rows.start, 0), (rows.stop, width))
        tiles.append(Tile(rows.parameter, box, storage, (row, 0)))
        row += rows.count
    return Storage(storage, (row, width)), tuple(tiles)


def columns_of(storage: str, parameter: str, shape: Index, part: int, num_parts: int) -> Piece:
    """Return a storage that is one of ``num_parts`` equal column slices of a parameter."""
    height, width = shape[0], shape[1] // num_parts
    box = Box((0, part * width), (height, (part + 1) * width))
    return Storage(storage, (height, width)), (Tile(parameter, box, storage, (0, 0)),)


def rows_of(parameter: str, height: int, part: int, num_parts: int) -> Rows:
    """Return one of ``num_parts`` equal row slices of a parameter of ``height`` rows."""
    num_rows = height // num_parts
    return Rows(parameter, part * num_rows, (part + 1) * num_rows)


def cut(segments: Sequence[Rows], start: int, stop: int) -> list[Rows]:
    """Return rows ``[start, stop)`` of the stack of ``segments``."""
    inside: list[Rows] = []
    offset = 0
    for rows in segments:
        low = max(start - offset, 0)
        high = min(stop - offset, rows.count)
        if low < high:
            inside.append(Rows(rows.parameter, rows.start + low, rows.start + high))
        offset += rows.count
    return inside
