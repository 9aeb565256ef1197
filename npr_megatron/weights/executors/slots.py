"""Versions of one rank's storages in a piece of memory, and how its readers tell them apart.

Each slot begins with a header that names what it holds, followed by the digest of each tile. The
version is cleared before the first byte of a new one is written and set after the last, hence a
reader that finds the same header before and after its copies has read one version. Whether the
memory is the host's or a device's makes no difference; who may map it is not known here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from npr_megatron.weights.storages import dtype_of
from npr_megatron.weights.tiles import RankLayout, Storage

_HEADER = struct.Struct("<8sq64s16sQ")
_PAGE_BYTES = 4096
_ALIGNMENT = 64  # a cache line: no two storages share one
_MAGIC = b"NPRARENA"


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """What a slot holds."""

    version: int
    """Negative while nothing complete is there."""
    layout_id: str = ""
    dtype: str = ""
    digest: int = 0
    """This rank's share in the first cover: what an inspector compares with the bytes."""


EMPTY = SlotHeader(-1)


def slot_bytes(rank_layout: RankLayout, dtype: torch.dtype) -> int:
    """Return the memory that one version of a rank takes, header included."""
    payload = sum(_storage_bytes(storage, dtype) for storage in rank_layout.storages)
    return _header_bytes(rank_layout) + _whole_pages(payload)


class Slots:
    """Equal slots in one piece of memory. Readers must not write to it."""

    def __init__(self, memory: Tensor, rank_layout: RankLayout, dtype: torch.dtype) -> None:
        """Look at ``memory``, uint8 of a multiple of ``slot_bytes``; zeros are empty slots."""
        self._memory = memory
        self._header_bytes = _header_bytes(rank_layout)
        self._num_tiles = len(rank_layout.tiles)
        self._slots = memory.view(-1, slot_bytes(rank_layout, dtype))
        self._views = tuple(_views(slot, rank_layout, dtype) for slot in self._slots)

    @property
    def num_slots(self) -> int:
        """Versions that fit."""
        return len(self._views)

    def header(self, slot: int) -> SlotHeader:
        """Return what ``slot`` holds at this moment."""
        found = self._slots[slot, : _HEADER.size].cpu().numpy().tobytes()
        magic, version, layout_id, dtype, digest = _HEADER.unpack(found)
        if magic != _MAGIC or version < 0:
            return EMPTY
        # bytes that were damaged must not match, and must not keep the reader from saying so
        name = dtype.rstrip(b"\0").decode(errors="replace")
        return SlotHeader(version, layout_id.decode(errors="replace"), name, digest)

    def tile_digests(self, slot: int) -> tuple[int, ...]:
        """Return the digests of the tiles in ``slot``, as its owner computed them."""
        table = self._slots[slot, _HEADER.size : _HEADER.size + 8 * self._num_tiles]
        return tuple(np.frombuffer(table.cpu().numpy().tobytes(), np.uint64).tolist())

    def storages(self, slot: int) -> dict[str, Tensor]:
        """Return views of the storages in ``slot``."""
        return self._views[slot]

    def begin(self, slot: int) -> None:
        """Declare ``slot`` empty, to be written; for the owner."""
        self._write_header(slot, EMPTY)

    def finish(self, slot: int, header: SlotHeader, tile_digests: Sequence[int]) -> None:
        """Declare ``slot`` complete; for the owner."""
        table = np.array(tile_digests, np.uint64).view(np.uint8)
        start = _HEADER.size
        self._slots[slot, start : start + table.size].copy_(torch.from_numpy(table))
        self._settle()
        self._write_header(slot, header)

    def _write_header(self, slot: int, header: SlotHeader) -> None:
        packed = _HEADER.pack(
            _MAGIC, header.version, header.layout_id.encode(), header.dtype.encode(), header.digest
        )
        found = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        self._slots[slot, : _HEADER.size].copy_(found)
        self._settle()

    def _settle(self) -> None:
        """Wait for device writes of any stream: other processes order by the header alone."""
        if self._memory.is_cuda:
            torch.cuda.synchronize(self._memory.device)


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES


def _header_bytes(rank_layout: RankLayout) -> int:
    return _whole_pages(_HEADER.size + 8 * len(rank_layout.tiles))


def _storage_bytes(storage: Storage, dtype: torch.dtype) -> int:
    """Return the room of one storage, rounded up to the alignment."""
    num_bytes = math.prod(storage.shape) * dtype_of(storage, dtype).itemsize
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _views(slot: Tensor, rank_layout: RankLayout, dtype: torch.dtype) -> dict[str, Tensor]:
    offset = _header_bytes(rank_layout)
    views: dict[str, Tensor] = {}
    for storage in rank_layout.storages:
        own = dtype_of(storage, dtype)
        num_bytes = math.prod(storage.shape) * own.itemsize
        views[storage.name] = slot[offset : offset + num_bytes].view(own).view(storage.shape)
        offset += _storage_bytes(storage, dtype)
    return views
