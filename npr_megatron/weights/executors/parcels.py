"""Boxes of storages as contiguous tensors on the wire, packed only where they have to be.

Both ends divide a message into the same parcels: each large copy is one, all small ones together
are one. Whether a parcel needs packing is then each end's own affair: a row slice is contiguous and
travels straight from or into its storage, a column slice is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npr_megatron.weights.executors.inproc import RankStorages
from npr_megatron.weights.plans.copies import Copy
from npr_megatron.weights.plans.messages import Message

_LARGE_BYTES = 2**19  # below, two copies in memory cost less than a message of its own
_ALIGNMENT = 64


class Staging:
    """Scratch memory for one round, used again by a later one: new memory is paid page by page."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._memory: Tensor | None = None
        self._used = 0

    def clear(self) -> None:
        """Give all of it away again; nothing taken before may still be in use."""
        self._used = 0

    def take(self, size: int, like: Tensor) -> Tensor:
        """Return room for ``size`` elements of the dtype and device of ``like``."""
        if self._memory is None:
            self._memory = torch.empty(self._num_bytes, dtype=torch.uint8, device=like.device)
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        stop = start + size * like.element_size()
        if stop > self._num_bytes:  # a row above the budget, or what alignment has eaten
            return like.new_empty(size)
        self._used = stop
        return self._memory[start:stop].view(like.dtype)


@dataclass(frozen=True, slots=True)
class Parcel:
    """Regions of storages of one dtype and the contiguous tensor that travels for them."""

    regions: tuple[Tensor, ...]
    """Empty if ``wire`` is the region itself."""
    wire: Tensor

    @classmethod
    def of(cls, regions: Sequence[Tensor], staging: Staging | None = None) -> Parcel:
        """Return the parcel of ``regions``; takes memory unless it is a single contiguous one."""
        if len(regions) == 1 and regions[0].is_contiguous():
            return cls((), regions[0].view(-1))
        size = sum(region.numel() for region in regions)
        wire = regions[0].new_empty(size) if staging is None else staging.take(size, regions[0])
        return cls(tuple(regions), wire)

    def pack(self) -> Tensor:
        """Bring the regions into the tensor that travels; return it."""
        for region, part in self._pairs():
            part.copy_(region)
        return self.wire

    def unpack(self) -> None:
        """Bring what arrived into the regions."""
        for region, part in self._pairs():
            region.copy_(part)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        if not self.regions:
            return []
        parts = self.wire.split([region.numel() for region in self.regions])
        return [(r, p.view(r.shape)) for r, p in zip(self.regions, parts, strict=True)]


def parcels_to_send(message: Message, sources: RankStorages, staging: Staging) -> list[Parcel]:
    """Return what the sender of ``message`` has to pack and send, in order."""
    return [
        Parcel.of(
            [sources[c.source_rank][c.source_storage][c.source_box.slices] for c in copies], staging
        )
        for copies in _divided(message)
    ]


def parcels_to_receive(message: Message, targets: RankStorages, staging: Staging) -> list[Parcel]:
    """Return what the receiver of ``message`` has to receive and unpack, in order."""
    return [
        Parcel.of(
            [targets[c.target_rank][c.target_storage][c.target_box.slices] for c in copies], staging
        )
        for copies in _divided(message)
    ]


def _divided(message: Message) -> list[list[Copy]]:
    bytes_each = message.num_bytes // message.num_elements
    small = [copy for copy in message.copies if copy.num_elements * bytes_each < _LARGE_BYTES]
    large = [[copy] for copy in message.copies if copy.num_elements * bytes_each >= _LARGE_BYTES]
    return [small, *large] if small else large
