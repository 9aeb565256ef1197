"""Weights between processes that share a GPU, or GPUs of one node, without leaving the devices.

The source allocates one piece of device memory for all its storages, once, and exports it once; the
handle travels in the publication. A destination opens it once and from then on copies what its plan
names on its own stream, waits for the stream, and only then reports the version as read. The source
must outlive its readers. By default there is room for a single version, device memory being dear:
publish the next one when every reader has reported; a late one learns that it was overwritten.

Handles are made and opened by ``torch.multiprocessing.reductions``. Its reference count knows one
opener per export, while ours has many: the memory goes back to the device when the source process
ends, not before. Everything up to the calls of the device is tested without one; those calls are
not yet.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from npr_megatron.errors import EnvironmentFault, StaleWeightsError
from npr_megatron.weights.executors.slots import Slots, slot_bytes
from npr_megatron.weights.executors.versions import Fill, VersionReader, VersionWriter
from npr_megatron.weights.publication import Publication, RankPublication
from npr_megatron.weights.tiles import Layout

_DEVICE_ARGUMENT = 6
"""Place of the device index in what ``reduce_tensor`` returns."""


@dataclass(frozen=True, slots=True)
class DeviceHandle:
    """How another process finds an arena; a publication carries it as ``address``."""

    device_uuid: str
    """Of the GPU: its index differs between processes that see different GPUs."""
    num_bytes: int
    arguments: str
    """Those of torch's rebuilding function, pickled, in base64."""

    @property
    def address(self) -> str:
        """The handle as text."""
        return json.dumps(asdict(self))

    @classmethod
    def at(cls, address: str) -> DeviceHandle:
        """Read a handle from a publication.

        Raises:
            StaleWeightsError: the publication is of another transport.
        """
        try:
            return cls(**json.loads(address))
        except (ValueError, TypeError) as error:
            raise StaleWeightsError(
                f"{address!r} is not the handle of device memory ({error}); the version was "
                "published by other means, receive it likewise"
            ) from error

    def on(self, visible: Sequence[str]) -> int:
        """Return the index of the arena's GPU among the UUIDs of those this process sees.

        Raises:
            EnvironmentFault: it does not see that GPU.
        """
        if self.device_uuid not in visible:
            raise EnvironmentFault(
                f"the weights are on GPU {self.device_uuid}, this process sees {list(visible)}; "
                "add it to CUDA_VISIBLE_DEVICES"
            )
        return visible.index(self.device_uuid)


class DevicePublisher:
    """The source side, one per source rank."""

    def __init__(
        self,
        layout: Layout,
        rank: int,
        dtype: torch.dtype,
        *,
        device: torch.device,
        num_versions: int = 1,
    ) -> None:
        """Reserve device memory for ``num_versions`` of rank ``rank`` in ``dtype``.

        Raises:
            EnvironmentFault: no CUDA, or not enough memory on ``device``.
        """
        _require_cuda()
        num_bytes = num_versions * slot_bytes(layout.ranks[rank], dtype)
        try:
            memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        except torch.cuda.OutOfMemoryError as error:
            raise EnvironmentFault(
                f"the weights to publish take {num_bytes} bytes of {device} ({error}); publish "
                "through shared memory instead"
            ) from error
        self._writer = VersionWriter(layout, rank, dtype)
        self._slots = Slots(memory, layout.ranks[rank], dtype)
        self._handle = _export(memory)

    def publish(self, version: int, storages: Mapping[str, Tensor]) -> RankPublication:
        """Copy this rank's storages into the arena as ``version``; then they may change again.

        Raises:
            StaleWeightsError: ``version`` is not above the last one.
            LayoutError: ``storages`` are not those of the layout.
        """
        fill = self._writer.copy_of(storages)
        return self._writer.write(
            version, fill, self._slots, self._handle.address, original=storages
        )

    def publish_with(self, version: int, fill: Fill) -> RankPublication:
        """Have ``fill`` write ``version`` into the arena: casts and quantises without another copy.

        Raises:
            StaleWeightsError: ``version`` is not above the last one.
        """
        return self._writer.write(version, fill, self._slots, self._handle.address)


class DeviceReceiver:
    """The destination side, one per destination rank. Keeps the arenas open between pulls."""

    def __init__(self, source: Layout, target: Layout, target_rank: int = 0) -> None:
        """Plan the transfer and prove the plan.

        Raises:
            EnvironmentFault: no CUDA.
            LayoutError: the layouts are not of the same model.
        """
        _require_cuda()
        self._reader = VersionReader(source, target, target_rank)
        self._arenas: dict[str, Slots] = {}

    def pull(self, publication: Publication, into: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Fill ``into`` with the published weights and return this rank's digest shares.

        As ``shared_memory.Receiver.pull``; the copies are done when it returns.
        """
        dtype = self._reader.check(publication, into)
        sources = {
            rank: self._open(publication.arena_paths[rank], rank, dtype)
            for rank in self._reader.source_ranks
        }
        return self._reader.read(publication, sources, into)

    def close(self) -> None:
        """Close the arenas."""
        self._arenas.clear()

    def _open(self, address: str, rank: int, dtype: torch.dtype) -> Slots:
        if address not in self._arenas:
            handle, rank_layout = DeviceHandle.at(address), self._reader.source.ranks[rank]
            check_size(handle, slot_bytes(rank_layout, dtype))
            self._arenas[address] = Slots(_import(handle), rank_layout, dtype)
        return self._arenas[address]


def check_size(handle: DeviceHandle, bytes_per_version: int) -> None:
    """Require an arena that holds whole versions.

    Raises:
        StaleWeightsError: it was made for another layout or dtype.
    """
    if handle.num_bytes == 0 or handle.num_bytes % bytes_per_version:
        raise StaleWeightsError(
            f"the device arena has {handle.num_bytes} bytes, a version takes {bytes_per_version}; "
            "read it with the layout and dtype of its publication"
        )


def _require_cuda() -> None:
    if not torch.cuda.is_available():
        raise EnvironmentFault(
            "weights were to be shared on a GPU, this process has no CUDA device; push through "
            "shared memory (npr_megatron.weights.executors.shared_memory)"
        )


def _export(memory: Tensor) -> DeviceHandle:
    _, arguments = reduce_tensor(memory)
    packed = base64.b64encode(pickle.dumps(arguments)).decode()
    return DeviceHandle(_uuid(memory.device.index), memory.numel(), packed)


def _import(handle: DeviceHandle) -> Tensor:
    index = handle.on([_uuid(number) for number in range(torch.cuda.device_count())])
    arguments = list(pickle.loads(base64.b64decode(handle.arguments)))
    arguments[_DEVICE_ARGUMENT] = index
    return rebuild_cuda_tensor(*arguments)


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
