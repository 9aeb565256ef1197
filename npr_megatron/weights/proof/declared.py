"""The tiles of a layout as the verifier reads them: in coordinates of storages, by column.

Reads declarations on its own, like everything that the verifier stands on. Storages and parameters
of fewer axes than the most there are get leading axes of extent 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from npr_megatron.weights.proof.intervals import Numbers, Spans, overlaps
from npr_megatron.weights.tiles import Layout, PinnedDtype, Tile

PINNED: tuple[PinnedDtype | None, ...] = (None, "fp32", "fp8_e4m3")
"""Dtypes by number, as copies count them."""


class Declared:
    """What one side of a transfer declares."""

    def __init__(self, layout: Layout, num_axes: int, parameters: dict[str, int]) -> None:
        """Lay everything out in ``num_axes`` axes; number new parameters in ``parameters``."""
        held = [(rank, s) for rank, one in enumerate(layout.ranks) for s in one.storages]
        self.place_names = [(rank, storage.name) for rank, storage in held]
        """Rank and storage name; a place is an index into this list."""
        self.places = {name: place for place, name in enumerate(self.place_names)}
        self.shape = padded([storage.shape for _, storage in held], num_axes, 1)
        """Of places."""
        self.num_axes = np.array([len(storage.shape) for _, storage in held], np.int64)
        """Of places."""
        self.dtype = np.array([PINNED.index(storage.dtype) for _, storage in held], np.int64)
        """Of places."""
        self.tiles: list[Tile] = [tile for one in layout.ranks for tile in one.tiles]
        self.parameter = np.array(
            [parameters.setdefault(tile.parameter, len(parameters)) for tile in self.tiles],
            np.int64,
        )
        """Of tiles."""
        self.rank: Numbers = np.repeat(
            np.arange(len(layout.ranks)), [len(one.tiles) for one in layout.ranks]
        )
        """Of tiles."""
        place = [
            self.places[(rank, tile.storage)]
            for rank, tile in zip(self.rank.tolist(), self.tiles, strict=True)
        ]
        at = padded([tile.at for tile in self.tiles], num_axes, 0)
        self.low = padded([tile.box.start for tile in self.tiles], num_axes, 0)
        """Canonical box of tiles."""
        self.high = padded([tile.box.stop for tile in self.tiles], num_axes, 1)
        self.spans = Spans(np.array(place, np.int64), at, at + self.high - self.low)
        """What tiles fill, by place."""
        self.to_canonical: Numbers = self.low - at
        """Of tiles."""

    def doubly_declared(self) -> Iterator[str]:
        """Yield a sentence for every two tiles that fill the same elements of a storage."""
        for one, other in overlaps(self.spans):
            place = self.place_names[int(self.spans.group[one])]
            yield f"storage {place}: {self.tiles[one]} and {self.tiles[other]} overlap"


def padded(indices: Sequence[tuple[int, ...]], num_axes: int, fill: int) -> Numbers:
    """Return index tuples as rows [n, num_axes] with leading ``fill``."""
    lengths = np.array([len(index) for index in indices], np.int64)
    rows = np.full((len(indices), num_axes), fill, np.int64)
    for length in set(lengths.tolist()):
        where = np.flatnonzero(lengths == length)
        values = chain.from_iterable(indices[row] for row in where.tolist())
        flat = np.fromiter(values, np.int64, len(where) * length)
        rows[where, num_axes - length :] = flat.reshape(len(where), length)
    return rows


def declare(source: Layout, target: Layout) -> tuple[Declared, Declared]:
    """Return both sides, laid out and numbered alike."""
    sides = (source, target)
    num_axes = max(len(s.shape) for side in sides for one in side.ranks for s in one.storages)
    parameters: dict[str, int] = {}
    return Declared(source, num_axes, parameters), Declared(target, num_axes, parameters)
