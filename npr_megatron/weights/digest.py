"""One number for the weights of a model, the same in every layout.

    D = sum over parameters p and elements (r, c) of  row_key_p[r] * column_key_p[c] * bits[r, c]

modulo 2**64, with odd random keys and ``bits`` the bit pattern of the element as an unsigned
integer. Addition makes shards independent: each rank sums what it holds and the sums add up,
without a gather. Keys belong to canonical coordinates, so swapped heads, layers or gate/up, shifted
rows and single flipped bits all change D. A replica must be counted once: by the lowest rank that
holds it (``owned_tiles``). Not a cryptographic hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npr_megatron.records.randomness import derive_seed
from npr_megatron.weights.box import Box
from npr_megatron.weights.storages import tile_view
from npr_megatron.weights.tiles import Layout, Tile

_UInt64Array = npt.NDArray[np.uint64]
_CHUNK_ELEMENTS = (
    32_768  # widened to uint64 they fill 256 KiB, which stays in the second-level cache
)
_SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def owned_tiles(layout: Layout) -> tuple[tuple[Tile, ...], ...]:
    """Return per rank the tiles it counts: each canonical box belongs to its lowest holder."""
    seen: set[tuple[str, Box]] = set()
    owned: list[tuple[Tile, ...]] = []
    for rank_layout in layout.ranks:
        own: list[Tile] = []
        for tile in rank_layout.tiles:
            if (tile.parameter, tile.box) not in seen:
                seen.add((tile.parameter, tile.box))
                own.append(tile)
        owned.append(tuple(own))
    return tuple(owned)


def digest_tensors(tiles: Iterable[Tile], storages: Mapping[str, Tensor]) -> int:
    """Return the share of ``tiles`` in the digest; shares of all ranks add up (:func:`total`).

    Args:
        tiles: what this rank counts, from :func:`owned_tiles`.
        storages: its tensors, of 2, 4 or 8 bytes per element.
    """
    return total(digest_box(tile.parameter, tile.box, tile_view(tile, storages)) for tile in tiles)


def total(shares: Iterable[int]) -> int:
    """Return the sum of digest shares modulo 2**64."""
    return sum(shares) % 2**64


def digest_box(parameter: str, box: Box, values: Tensor) -> int:
    """Return the share of ``parameter[box]``, given its values."""
    bits = _bits(values)
    row_keys = np.ones(1, np.uint64)
    if bits.ndim == 1:
        bits = bits[None, :]
    else:
        row_keys = _keys(parameter, "row", box.start[0], box.stop[0])
    column_keys = _keys(parameter, "column", box.start[-1], box.stop[-1])
    height = max(1, _CHUNK_ELEMENTS // bits.shape[1])
    row_sums = [
        np.einsum("rc,c->r", bits[row : row + height].astype(np.uint64), column_keys)
        for row in range(0, bits.shape[0], height)
    ]
    return int(np.dot(np.concatenate(row_sums), row_keys))


def _bits(values: Tensor) -> npt.NDArray[np.unsignedinteger]:
    size = values.element_size()
    return values.detach().cpu().view(_SIGNED[size]).numpy().view(_UNSIGNED[size])


def _keys(parameter: str, axis: str, start: int, stop: int) -> _UInt64Array:
    """Return the odd keys of coordinates ``[start, stop)``."""
    stream = np.random.Philox(derive_seed("digest", parameter, axis))
    return stream.random_raw(stop)[start:] | np.uint64(1)
