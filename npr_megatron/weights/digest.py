"""One number for the weights of a model, the same in every layout.

    D = sum over parameters p and elements (r, c) of  row_key_p[r] * column_key_p[c] * bits[r, c]

modulo 2**64, with odd random keys and ``bits`` the bit pattern of the element as an unsigned
integer. Addition makes shards independent: each rank sums what it holds and the sums add up,
without a gather. Keys belong to canonical coordinates, so swapped heads, layers or gate/up, shifted
rows and single flipped bits all change D. Replicas are not summed twice but compared (``Census``).
Not a cryptographic hash.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npr_megatron.records.randomness import derive_seed
from npr_megatron.weights.box import Box
from npr_megatron.weights.storages import tile_view
from npr_megatron.weights.tiles import Layout, Tile

_UInt64Array = npt.NDArray[np.uint64]
_SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, slots=True)
class _Counted:
    """A tile and the covers in which it is counted."""

    tile: Tile
    covers: tuple[int, ...]


class Census:
    """Who counts what, so that every replica is looked at.

    A cover picks one holder of each canonical box, hence its sum is the digest of the whole model.
    A layout whose most replicated box has M holders gets M covers; together they reach every tile,
    and all M sums are equal exactly if no replica differs.
    """

    def __init__(self, layout: Layout) -> None:
        holders: defaultdict[tuple[str, Box], list[int]] = defaultdict(list)
        for rank, rank_layout in enumerate(layout.ranks):
            for tile in rank_layout.tiles:
                holders[(tile.parameter, tile.box)].append(rank)
        self.num_covers = max(map(len, holders.values()))
        turns: defaultdict[tuple[str, Box], int] = defaultdict(int)
        ranks: list[tuple[_Counted, ...]] = []
        for rank_layout in layout.ranks:
            counted: list[_Counted] = []
            for tile in rank_layout.tiles:
                key = (tile.parameter, tile.box)
                covers = range(turns[key], self.num_covers, len(holders[key]))
                counted.append(_Counted(tile, tuple(covers)))
                turns[key] += 1
            ranks.append(tuple(counted))
        self._ranks = tuple(ranks)

    def shares(self, rank: int, storages: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Return the share of ``rank`` in each cover, from its tensors (2, 4 or 8 bytes each)."""
        sums = [0] * self.num_covers
        for counted in self._ranks[rank]:
            tile = counted.tile
            value = digest_box(tile.parameter, tile.box, tile_view(tile, storages))
            for cover in counted.covers:
                sums[cover] += value
        return tuple(value % 2**64 for value in sums)


def digests(shares: Iterable[tuple[int, ...]]) -> set[int]:
    """Add up the shares of all ranks; return the distinct sums: one, if all replicas are equal."""
    return {sum(cover) % 2**64 for cover in zip(*shares, strict=True)}


def digest_box(parameter: str, box: Box, values: Tensor) -> int:
    """Return the share of ``parameter[box]``, given its values."""
    bits = np.atleast_2d(_bits(values))
    row_keys = np.ones(1, np.uint64)
    if len(box.start) == 2:
        row_keys = _keys(parameter, "row", box.start[0], box.stop[0])
    column_keys = _keys(parameter, "column", box.start[-1], box.stop[-1])
    row_sums = np.einsum("rc,c->r", bits, column_keys)  # widens to 64 bits in small buffers
    return int(np.dot(row_sums, row_keys))


def _bits(values: Tensor) -> npt.NDArray[np.unsignedinteger]:
    size = values.element_size()
    return values.detach().cpu().view(_SIGNED[size]).numpy().view(_UNSIGNED[size])


def _keys(parameter: str, axis: str, start: int, stop: int) -> _UInt64Array:
    """Return the odd keys of coordinates ``[start, stop)``."""
    stream = np.random.Philox(derive_seed("digest", parameter, axis))
    return stream.random_raw(stop)[start:] | np.uint64(1)
