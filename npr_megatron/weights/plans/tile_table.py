"""The tiles of two layouts as columns of integers: what lets a plan for a large model take seconds.

All coordinates are aligned to the right: a parameter or storage of fewer axes than the most there
are gets leading axes of extent 1, so that parameters and storages of any rank share one geometry.
Names become numbers, in the order of the sorted names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from npr_megatron.weights.box import Index
from npr_megatron.weights.tiles import Layout, PinnedDtype, RankLayout, Tile

Ints = npt.NDArray[np.int64]

PINNED_DTYPES: tuple[PinnedDtype | None, ...] = (None, "fp32", "fp8_e4m3")
"""Pinned dtypes by number."""


@dataclass(frozen=True, slots=True)
class TileTable:
    """One row per tile, ranks in order; ``[n]`` or ``[n, axes]``."""

    rank: Ints
    parameter: Ints
    storage: Ints
    dtype: Ints
    num_axes: Ints
    """Axes of the parameter."""
    storage_axes: Ints
    start: Ints
    stop: Ints
    shift: Ints
    """From canonical coordinates to those of the storage."""
    storage_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rank)


def tile_tables(source: Layout, target: Layout) -> tuple[TileTable, TileTable, tuple[str, ...]]:
    """Return the tiles of both layouts and the names of their parameters, numbered alike."""
    layouts = (source, target)
    distinct = [_distinct(layout.ranks) for layout in layouts]
    tiles = [[tile for rank in ranks for tile in rank.tiles] for ranks in distinct]
    parameters = sorted({tile.parameter for part in tiles for tile in part})
    width = max((len(tile.at) for part in tiles for tile in part), default=1)
    numbers = {name: number for number, name in enumerate(parameters)}
    tables = [
        _table(layout, ranks, part, numbers, width)
        for layout, ranks, part in zip(layouts, distinct, tiles, strict=True)
    ]
    return tables[0], tables[1], tuple(parameters)


def right_aligned(indices: Sequence[Index], width: int, fill: int) -> tuple[Ints, Ints]:
    """Return tuples of different lengths as rows [n, width] and their lengths [n]."""
    lengths = _ints(map(len, indices), len(indices))
    rows = np.full((len(indices), width), fill, np.int64)
    flat = _ints(chain.from_iterable(indices), int(lengths.sum()))
    rows[np.arange(width) >= (width - lengths)[:, None]] = flat
    return rows, lengths


def _ints(values: Iterable[int], count: int) -> Ints:
    return np.fromiter(values, np.int64, count)


def _distinct(ranks: Iterable[RankLayout]) -> list[RankLayout]:
    """Return each object once: data-parallel ranks often share theirs."""
    return list({id(rank): rank for rank in ranks}.values())


def _table(
    layout: Layout,
    distinct: Sequence[RankLayout],
    tiles: Sequence[Tile],
    numbers: dict[str, int],
    width: int,
) -> TileTable:
    storage_names = sorted({storage.name for rank in distinct for storage in rank.storages})
    storages = {name: number for number, name in enumerate(storage_names)}
    count = len(tiles)
    start, num_axes = right_aligned([tile.box.start for tile in tiles], width, 0)
    stop, _ = right_aligned([tile.box.stop for tile in tiles], width, 1)
    at, storage_axes = right_aligned([tile.at for tile in tiles], width, 0)
    order, ranks = _expand(layout, distinct)
    columns = {
        "parameter": _ints((numbers[tile.parameter] for tile in tiles), count),
        "storage": _ints((storages[tile.storage] for tile in tiles), count),
        "dtype": _ints(chain.from_iterable(map(_dtypes, distinct)), count),
        "num_axes": num_axes,
        "storage_axes": storage_axes,
        "start": start,
        "stop": stop,
        "shift": at - start,
    }
    return TileTable(
        rank=ranks,
        storage_names=tuple(storage_names),
        **{name: column[order] for name, column in columns.items()},
    )


def _dtypes(rank: RankLayout) -> Iterable[int]:
    """Return the dtype of the storage of each tile."""
    codes = {storage.name: PINNED_DTYPES.index(storage.dtype) for storage in rank.storages}
    return (codes[tile.storage] for tile in rank.tiles)


def _expand(layout: Layout, distinct: Sequence[RankLayout]) -> tuple[Ints, Ints]:
    """Return, for the tiles of all ranks, their row among distinct ones and their rank."""
    firsts: dict[int, int] = {}
    count = 0
    for rank in distinct:
        firsts[id(rank)] = count
        count += len(rank.tiles)
    rows = [np.arange(len(rank.tiles)) + firsts[id(rank)] for rank in layout.ranks]
    sizes = [len(rank.tiles) for rank in layout.ranks]
    return np.concatenate(rows).astype(np.int64), np.repeat(np.arange(len(sizes)), sizes)
