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
from collections.abc import Iterable, Iterator, Sequence
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

    def content_hash(self) -> str:
        """Return the SHA-256 of all storages and tiles in their order (64 hexadecimal digits)."""
        # a quarter of the time of repr, which matters at 300,000 tiles
        storages = [f"{s.name} {s.shape} {s.dtype}\n" for s in self.storages]
        tiles = [
            f"{t.parameter} {t.box.start} {t.box.stop} {t.storage} {t.at}\n" for t in self.tiles
        ]
        return hashlib.sha256("".join(storages + tiles).encode()).hexdigest()


@dataclass(frozen=True)
class Layout:
    """All ranks that together hold a model, perhaps several times over."""

    kind: str
    """``trainer``, ``engine`` or ``canonical``; for messages."""
    ranks: tuple[RankLayout, ...]

    def __hash__(self) -> int:
        return hash(self.layout_id)  # computed once, unlike the hash of all tiles

    @cached_property
    def layout_id(self) -> str:
        """SHA-256 of the whole declaration (64 hexadecimal digits)."""
        # replicas are often one object: each is written out once, then counts by its own hash
        hashes = {id(rank): rank.content_hash() for rank in self.ranks}
        content = [self.kind, *(hashes[id(rank)] for rank in self.ranks)]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()


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


def whole(storage: str, parameter: str, shape: Index, dtype: PinnedDtype | None = None) -> Piece:
    """Return a storage that is a parameter."""
    origin = (0,) * len(shape)
    tile = Tile(parameter, Box(origin, shape), storage, origin)
    return Storage(storage, shape, dtype), (tile,)


def stack(storage: str, segments: Sequence[Rows], width: int, num_rows: int | None = None) -> Piece:
    """Return a storage of full-width row segments, on top of each other.

    Args:
        num_rows: height of the storage; what the segments leave of it, at the end, is padding.
    """
    tiles: list[Tile] = []
    row = 0
    for rows in segments:
        box = Box((rows.start, 0), (rows.stop, width))
        tiles.append(Tile(rows.parameter, box, storage, (row, 0)))
        row += rows.count
    return Storage(storage, (row if num_rows is None else num_rows, width)), tuple(tiles)


def padded_rows(
    storage: str, parameter: str, shape: Index, num_rows: int, part: int, num_parts: int
) -> Piece:
    """Return one of ``num_parts`` equal row slices of a parameter that is padded at the end to
    ``num_rows`` rows; a slice that is all padding has no tile."""
    height = num_rows // num_parts
    start, stop = part * height, min((part + 1) * height, shape[0])
    rows = [Rows(parameter, start, stop)] if start < stop else []
    return stack(storage, rows, shape[1], height)


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


class Prefixed(dict[str, str]):
    """Names with a prefix before them, each made once: ``Prefixed("a.")["b"]`` is ``a.b``."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def __missing__(self, name: str) -> str:
        self[name] = full = self._prefix + name
        return full


def renamed(pieces: Iterable[Piece], parameters: Prefixed, storages: Prefixed) -> Iterator[Piece]:
    """Yield ``pieces`` with prefixes before the names of their parameters and storages.

    The layers of a model differ in their names only: one is cut, the others are renamed. That also
    keeps one copy of every box.
    """
    for storage, tiles in pieces:
        name = storages[storage.name]
        yield (
            Storage(name, storage.shape, storage.dtype),
            tuple([Tile(parameters[tile.parameter], tile.box, name, tile.at) for tile in tiles]),
        )
