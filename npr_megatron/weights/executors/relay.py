"""Pass a staged version along a chain of engines of equal layout; each sends on while it receives.

The time of a push then does not grow with the fleet: the last engine of a chain is one chunk per
link behind the first. A process that lost its parent keeps the chunks it has and goes on with
another parent; one that lost its child completes its own copy first. Chunks are slices of the
storages themselves, only small storages are packed. Nobody serves what arrived before its digest is
checked; this module moves bytes and does not know what they are.

Runs over gloo and NCCL. Give every link its own process group of two: a group whose deadline passed
is lost with all its links, and NCCL carries out the work of one group in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from npr_megatron.errors import EnvironmentFault, LayoutError
from npr_megatron.weights.executors.parcels import Parcel
from npr_megatron.weights.executors.point_to_point import InFlight, Transfer


@dataclass(frozen=True, slots=True)
class Link:
    """A neighbour in the chain."""

    name: str
    """Who it is, for messages."""
    process_group: dist.ProcessGroup
    peer: int
    """Its rank in the group."""


class Relay:
    """One engine rank in a chain, for one version. Remembers how far it got."""

    def __init__(
        self,
        storages: Mapping[str, Tensor],
        *,
        is_source: bool = False,
        timeout_s: float,
        chunk_bytes: int = 16 * 2**20,
    ) -> None:
        """Cut ``storages`` into chunks; the same ones on every rank of equal layout.

        Args:
            storages: contiguous; read by a source, filled in place by all others.
            is_source: whether they hold the whole version already.
            timeout_s: longest wait for one chunk.
        """
        self._chunks = _chunks(storages, chunk_bytes)
        self._timeout_s = timeout_s
        self.num_held = self.num_chunks if is_source else 0
        """Chunks received; a new parent goes on with this one."""

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole version."""
        return len(self._chunks)

    @torch.no_grad()
    def run(self, parent: Link | None, child: Link | None, child_needs: int = 0) -> None:
        """Receive what is missing from ``parent`` and send chunks from ``child_needs`` on.

        Raises:
            EnvironmentFault: a neighbour did not pass a chunk in time or is gone; the message names
                it. If it is the child, everything is received nevertheless.
        """
        upstream = _Upstream(self._chunks, parent, self._timeout_s)
        downstream = _Downstream(self._chunks, child, child_needs, self._timeout_s)
        for number in range(min(self.num_held, child_needs), self.num_chunks):
            if number >= self.num_held:
                upstream.take(number)
                self.num_held = number + 1
            downstream.offer(number)
        downstream.finish()


class _Upstream:
    """Receives chunks in order, the next one already posted."""

    def __init__(self, chunks: Sequence[_Chunk], link: Link | None, timeout_s: float) -> None:
        self._chunks, self._link, self._timeout_s = chunks, link, timeout_s
        self._posted: dict[int, tuple[Parcel, InFlight]] = {}

    def take(self, number: int) -> None:
        """Return when chunk ``number`` is in the storages."""
        if self._link is None:
            raise LayoutError(f"chunk {number} is missing and no parent was given; name one")
        try:
            for ahead in range(number, min(number + 2, len(self._chunks))):
                if ahead not in self._posted:
                    self._posted[ahead] = self._post(ahead, self._link)
            parcel, in_flight = self._posted.pop(number)
            in_flight.wait(self._timeout_s)
        except EnvironmentFault as error:
            raise EnvironmentFault(
                f"parent {self._link.name} did not pass chunk {number} of {len(self._chunks)} "
                f"({error}); the {number} before it are held, go on with another parent"
            ) from error
        parcel.unpack()

    def _post(self, number: int, link: Link) -> tuple[Parcel, InFlight]:
        parcel = Parcel.of(self._chunks[number])
        transfer = Transfer(link.peer, parcel.wire, number, is_send=False)
        return parcel, InFlight([transfer], link.process_group)


class _Downstream:
    """Sends chunks without waiting; a lost child is remembered, not raised, until the end."""

    def __init__(
        self, chunks: Sequence[_Chunk], link: Link | None, first: int, timeout_s: float
    ) -> None:
        self._chunks, self._link, self._first, self._timeout_s = chunks, link, first, timeout_s
        self._posted: list[tuple[int, InFlight]] = []
        self._lost: EnvironmentFault | None = None

    def offer(self, number: int) -> None:
        """Start to send chunk ``number`` if the child wants it."""
        if self._link is None or number < self._first or self._lost is not None:
            return
        transfer = Transfer(
            self._link.peer, Parcel.of(self._chunks[number]).pack(), number, is_send=True
        )
        try:
            self._posted.append((number, InFlight([transfer], self._link.process_group)))
        except EnvironmentFault as error:
            self._lost = self._fault(self._link, number, error)

    def finish(self) -> None:
        """Return when the child has taken everything, raise if it did not."""
        for number, in_flight in self._posted:
            if self._link is None or self._lost is not None:
                break
            try:
                in_flight.wait(self._timeout_s)
            except EnvironmentFault as error:
                self._lost = self._fault(self._link, number, error)
        if self._lost is not None:
            raise self._lost

    def _fault(self, link: Link, number: int, error: EnvironmentFault) -> EnvironmentFault:
        return EnvironmentFault(
            f"child {link.name} did not take chunk {number} of {len(self._chunks)} ({error}); "
            "everything is received here, have it ask another parent"
        )


_Chunk = tuple[Tensor, ...]
"""Flat uint8 slices of storages."""


def _chunks(storages: Mapping[str, Tensor], chunk_bytes: int) -> list[_Chunk]:
    """Cut storages, by name, into chunks of at most ``chunk_bytes``."""
    chunks: list[_Chunk] = []
    small: list[Tensor] = []
    for name in sorted(storages):
        flat = storages[name].view(-1).view(torch.uint8)
        if flat.numel() >= chunk_bytes:
            chunks += [(part,) for part in flat.split(chunk_bytes)]
            continue
        if sum(part.numel() for part in small) + flat.numel() > chunk_bytes:
            chunks.append(tuple(small))
            small = []
        small.append(flat)
    return [*chunks, tuple(small)] if small else chunks
