"""One number for the weights of a model, the same in every layout.

    D = sum over parameters p and elements (r, c) of  row_key_p[r] * column_key_p[c] * bits[r, c]

modulo 2**64, with odd random keys and ``bits`` the bit pattern of the element as an unsigned
integer. Addition makes shards independent: each rank sums what it holds and the sums add up,
without a gather. Keys belong to canonical coordinates, so swapped heads, layers or gate/up, shifted
rows and single flipped bits all change D. Replicas are not summed twice but compared (``Census``).
Each tile has a digest of its own, which tells where two models differ. Not a cryptographic hash.

Host tensors are summed by numpy (0.5 ns an element, faster than torch integers or exact float
products), device tensors where they are, by integer operations that give the same numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npr_megatron.records.randomness import derive_seed
from npr_megatron.weights.box import Box
from npr_megatron.weights.storages import tile_view
from npr_megatron.weights.tiles import Layout, Tile

_UInt64Array = npt.NDArray[np.uint64]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_DEVICE_ELEMENTS = 2**24  # widened at a time: 128 MiB of scratch memory


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

    def tile_digests(self, rank: int, storages: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Return the digest of each tile of ``rank``, in the order of its layout."""
        return tuple(
            digest_box(tile.parameter, tile.box, tile_view(tile, storages))
            for tile in (counted.tile for counted in self._ranks[rank])
        )

    def sum_tiles(self, rank: int, tile_digests: Sequence[int]) -> tuple[int, ...]:
        """Return the share of ``rank`` in each cover, from the digests of its tiles."""
        sums = [0] * self.num_covers
        for counted, value in zip(self._ranks[rank], tile_digests, strict=True):
            for cover in counted.covers:
                sums[cover] += value
        return tuple(value % 2**64 for value in sums)

    def shares(self, rank: int, storages: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Return the share of ``rank`` in each cover, from its tensors (of 1, 2, 4 or 8 bytes)."""
        return self.sum_tiles(rank, self.tile_digests(rank, storages))


@lru_cache(maxsize=2)
def census_of(layout: Layout) -> Census:
    """Return the census of ``layout``; all ranks that a process holds share one."""
    return Census(layout)


def digests(shares: Iterable[tuple[int, ...]]) -> set[int]:
    """Add up the shares of all ranks; return the distinct sums: one, if all replicas are equal."""
    return {sum(cover) % 2**64 for cover in zip(*shares, strict=True)}


def digest_box(parameter: str, box: Box, values: Tensor) -> int:
    """Return the share of ``parameter[box]``, given its values."""
    row_keys = np.ones(1, np.uint64)
    if len(box.start) == 2:
        row_keys = _keys(parameter, "row", box.start[0], box.stop[0])
    column_keys = _keys(parameter, "column", box.start[-1], box.stop[-1])
    bits = torch.atleast_2d(values.detach()).view(_INTEGERS[values.element_size()])
    add_up = _add_up_on_host if bits.device.type == "cpu" else add_up_on_device
    return add_up(bits, row_keys, column_keys)


def _add_up_on_host(bits: Tensor, row_keys: _UInt64Array, column_keys: _UInt64Array) -> int:
    words = bits.numpy().view(_UNSIGNED[bits.element_size()])
    row_sums = np.einsum("rc,c->r", words, column_keys)  # widens to 64 bits in small buffers
    return int(np.dot(row_sums, row_keys))


def add_up_on_device(bits: Tensor, row_keys: _UInt64Array, column_keys: _UInt64Array) -> int:
    """Return the sum of ``row_keys[r] * column_keys[c] * bits[r, c]`` modulo 2**64.

    Signed 64-bit products and sums wrap around to the same bits as unsigned ones.

    Args:
        bits: [R, C] integers of 1, 2, 4 or 8 bytes on any device; only the sum leaves it.
    """
    rows, columns = (
        torch.from_numpy(keys.view(np.int64)).to(bits.device) for keys in (row_keys, column_keys)
    )
    mask = (1 << 8 * bits.element_size()) - 1
    height = max(1, _DEVICE_ELEMENTS // bits.shape[1])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.shape[0], height):
        words = bits[start : start + height].to(torch.int64)
        if bits.element_size() < 8:
            words &= mask  # undoes the sign extension
        row_sums = words.mul_(columns).sum(1)
        total += row_sums.mul_(rows[start : start + height]).sum()
    return int(total) % 2**64


def _keys(parameter: str, axis: str, start: int, stop: int) -> _UInt64Array:
    """Return the odd keys of coordinates ``[start, stop)``."""
    stream = np.random.Philox(derive_seed("digest", parameter, axis))
    return stream.random_raw(stop)[start:] | np.uint64(1)
