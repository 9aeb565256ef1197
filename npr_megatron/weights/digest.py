"""One number for the weights of a model, the same in every layout.

    D = sum over parameters p and elements (r, c) of  key[p] * row_key[r] * column_key[c] * bits

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
from npr_megatron.weights.box import Box, Index
from npr_megatron.weights.tiles import Layout, Tile

_UInt64Array = npt.NDArray[np.uint64]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_DEVICE_ELEMENTS = 2**24  # widened at a time: 128 MiB of scratch memory


_Place = tuple[Tile, tuple[slice, ...], Index]
"""A tile, where it is in its storage, and the shape of its box."""


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
        self._places: dict[int, tuple[_Place, ...]] = {}

    def tile_digests(self, rank: int, storages: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Return the digest of each tile of ``rank``, in the order of its layout."""
        if rank not in self._places:
            tiles = (counted.tile for counted in self._ranks[rank])
            self._places[rank] = tuple((t, t.storage_box.slices, t.box.shape) for t in tiles)
        return tuple(
            digest_box(tile.parameter, tile.box, storages[tile.storage][slices].view(shape))
            for tile, slices, shape in self._places[rank]
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
    bits = values.detach().view(_INTEGERS[values.element_size()])
    rows = (0, 1)  # a vector is the first row of a matrix
    if len(box.start) == 2:
        rows = (box.start[0], box.stop[0])
    else:
        bits = bits.unsqueeze(0)
    columns = (box.start[-1], box.stop[-1])
    if bits.device.type == "cpu":
        total = _add_up_on_host(bits, _keys("row", *rows), _keys("column", *columns))
    else:
        total = add_up_on_device(
            bits,
            _device_keys("row", *rows, bits.device),
            _device_keys("column", *columns, bits.device),
        )
    return total * _parameter_key(parameter) % 2**64


def _add_up_on_host(bits: Tensor, row_keys: _UInt64Array, column_keys: _UInt64Array) -> int:
    words = bits.numpy().view(_UNSIGNED[bits.element_size()])
    row_sums = np.einsum("rc,c->r", words, column_keys)  # widens to 64 bits in small buffers
    return int(np.dot(row_sums, row_keys))


def add_up_on_device(bits: Tensor, row_keys: Tensor, column_keys: Tensor) -> int:
    """Return the sum of ``row_keys[r] * column_keys[c] * bits[r, c]`` modulo 2**64.

    Signed 64-bit products and sums wrap around to the same bits as unsigned ones.

    Args:
        bits: [R, C] integers of 1, 2, 4 or 8 bytes on any device; only the sum leaves it.
        row_keys: [R] int64 on that device.
        column_keys: [C] int64 on that device.
    """
    mask = (1 << 8 * bits.element_size()) - 1
    height = max(1, _DEVICE_ELEMENTS // bits.shape[1])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.shape[0], height):
        words = bits[start : start + height].to(torch.int64, copy=True)
        if bits.element_size() < 8:
            words &= mask  # undoes the sign extension
        row_sums = words.mul_(column_keys).sum(1)
        total += row_sums.mul_(row_keys[start : start + height]).sum()
    return int(total) % 2**64


def _keys(axis: str, start: int, stop: int) -> _UInt64Array:
    """Return the odd keys of coordinates ``[start, stop)``."""
    return _stream(axis, _rounded(stop))[start:stop]


def _device_keys(axis: str, start: int, stop: int, device: torch.device) -> Tensor:
    return _stream_on(axis, _rounded(stop), device)[start:stop]


def _rounded(length: int) -> int:
    """Return a power of two, so that few lengths are cached."""
    return max(2**12, 1 << (length - 1).bit_length())


@lru_cache(maxsize=32)
def _stream(axis: str, length: int) -> _UInt64Array:
    """Return the first ``length`` keys of an axis; a longer stream begins with a shorter one."""
    return np.random.Philox(derive_seed("digest", axis)).random_raw(length) | np.uint64(1)


@lru_cache(maxsize=32)
def _stream_on(axis: str, length: int, device: torch.device) -> Tensor:
    return torch.from_numpy(_stream(axis, length).view(np.int64)).to(device)


@lru_cache(maxsize=2**17)
def _parameter_key(parameter: str) -> int:
    return derive_seed("digest", parameter) | 1
