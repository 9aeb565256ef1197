"""The storages of one source rank as a safetensors file, and what that file must be.

The layout and the dtype say where every tensor lies, so readers need not trust the header: it must
be the expected one. Storages are cast and written one after the other, which bounds the memory to
the largest of them; a failed write leaves no file.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from npr_megatron.errors import EnvironmentFault, InputError
from npr_megatron.weights.box import Box
from npr_megatron.weights.checkpoints.safetensors_files import header_bytes
from npr_megatron.weights.checkpoints.stored import StoredChunk, StoredTensor, read_box
from npr_megatron.weights.digest import digest_box
from npr_megatron.weights.storages import dtype_of, tile_view
from npr_megatron.weights.tiles import RankLayout

_HASHED_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class ShardFile:
    """What the file of a shard must be."""

    name: str
    num_bytes: int
    sha256: str
    tile_digests: tuple[int, ...]
    """In the order of the rank's layout."""


def write_shard_file(
    path: Path, rank_layout: RankLayout, dtype: torch.dtype, storages: Mapping[str, Tensor]
) -> ShardFile:
    """Write ``storages``, cast to ``dtype`` where none is pinned; on disk when this returns.

    Raises:
        EnvironmentFault: disk full or not writable; names file and tensor, and no file is left.
    """
    digests: dict[int, int] = {}
    tiles = _tiles_by_storage(rank_layout)
    sha256 = hashlib.sha256()
    current = "the header"
    try:
        with path.open("wb") as file:
            header = _header(rank_layout, dtype)
            file.write(header)
            sha256.update(header)
            for storage in rank_layout.storages:
                current = storage.name
                own = storages[storage.name].detach().to("cpu", dtype_of(storage, dtype))
                for number in tiles[storage.name]:
                    tile = rank_layout.tiles[number]
                    view = tile_view(tile, {storage.name: own})
                    digests[number] = digest_box(tile.parameter, tile.box, view)
                content = own.contiguous().view(-1).view(torch.uint8).numpy().data
                file.write(content)
                file.flush()  # or the error would name a later tensor
                sha256.update(content)
            os.fsync(file.fileno())
            num_bytes = file.tell()
    except OSError as error:
        path.unlink(missing_ok=True)
        raise cannot_write(path, current, error, expected_bytes(rank_layout, dtype)) from error
    ordered = tuple(digests[number] for number in range(len(rank_layout.tiles)))
    return ShardFile(path.name, num_bytes, sha256.hexdigest(), ordered)


def cannot_write(path: Path, what: str, error: OSError, num_bytes: int) -> EnvironmentFault:
    """Return the error for a disk that did not take ``what`` into ``path``."""
    folder = next(parent for parent in path.parents if parent.exists())
    room = os.statvfs(folder)
    return EnvironmentFault(
        f"{path}: {what} could not be written ({error}); the file takes {num_bytes} bytes, "
        f"{folder} has {room.f_bavail * room.f_frsize} free; make room and publish again"
    )


def expected_bytes(rank_layout: RankLayout, dtype: torch.dtype) -> int:
    """Return the size of a shard file."""
    return len(_header(rank_layout, dtype)) + sum(
        math.prod(storage.shape) * dtype_of(storage, dtype).itemsize
        for storage in rank_layout.storages
    )


def open_shard(path: Path, rank_layout: RankLayout, dtype: torch.dtype) -> dict[str, StoredTensor]:
    """Return the tensors of a shard file, to be read box by box.

    Raises:
        InputError: the file is missing, truncated, or of other tensors; names file and tensor.
    """
    tensors = dict(_tensors(path, rank_layout, dtype))
    header = _header(rank_layout, dtype)
    try:
        with path.open("rb") as file:
            found = file.read(len(header))
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InputError(f"shard {path} cannot be read ({error}); copy it again") from error
    for tensor in tensors.values():
        end = tensor.chunks[0].offset + tensor.num_bytes
        if end > size:
            raise InputError(
                f"shard {path} has {size} bytes, {tensor.name} {list(tensor.shape)} ends at byte "
                f"{end}; the file is truncated, copy it again"
            )
    if found != header:
        raise InputError(
            f"shard {path} does not hold the tensors of its layout in {dtype}: its header differs; "
            "read it with the layout that wrote it, or copy it again"
        )
    return tensors


def shard_faults(
    path: Path, rank_layout: RankLayout, dtype: torch.dtype, expected: ShardFile
) -> list[str]:
    """Return what is not as it was written, one phrase per tensor; reads the whole file.

    Raises:
        InputError: as ``open_shard``.
    """
    tensors = open_shard(path, rank_layout, dtype)
    if sha256_of(path) == expected.sha256:
        return []
    found: list[str] = []
    for tile, digest in zip(rank_layout.tiles, expected.tile_digests, strict=True):
        tensor = tensors[tile.storage]
        values = torch.empty(tile.storage_box.shape, dtype=tensor.dtype)
        read_box(tensor, tile.storage_box, values)
        if digest_box(tile.parameter, tile.box, values.view(tile.box.shape)) != digest:
            found.append(f"{tile.parameter} in {path}")
    return found or [f"bytes that no tensor uses in {path}"]


def _tiles_by_storage(rank_layout: RankLayout) -> defaultdict[str, list[int]]:
    tiles: defaultdict[str, list[int]] = defaultdict(list)
    for number, tile in enumerate(rank_layout.tiles):
        tiles[tile.storage].append(number)
    return tiles


def _header(rank_layout: RankLayout, dtype: torch.dtype) -> bytes:
    return header_bytes([(s.name, s.shape, dtype_of(s, dtype)) for s in rank_layout.storages])


def _tensors(
    path: Path, rank_layout: RankLayout, dtype: torch.dtype
) -> Iterator[tuple[str, StoredTensor]]:
    offset = len(_header(rank_layout, dtype))
    for storage in rank_layout.storages:
        chunk = StoredChunk(Box((0,) * len(storage.shape), storage.shape), path, offset)
        tensor = StoredTensor(storage.name, storage.shape, dtype_of(storage, dtype), (chunk,))
        yield storage.name, tensor
        offset += tensor.num_bytes


def sha256_of(path: Path) -> str:
    """Return the hash of a file (64 hexadecimal digits)."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_HASHED_BYTES):
            found.update(part)
    return found.hexdigest()
