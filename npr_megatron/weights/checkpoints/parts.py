"""The files that a checkpoint will consist of, and how one of them is written.

A part is a file with the pieces that go into it, one after another. Planning looks at shapes only,
so the same request always gives the same parts: an interrupted conversion can be continued by
comparing what is there with what is planned. A piece is what memory holds at a time.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npr_megatron.config.model import ModelConfig
from npr_megatron.weights.box import Box, Index
from npr_megatron.weights.checkpoints.chunking import ChunkBox, ReaderShape, chunk_groups, row_bands
from npr_megatron.weights.checkpoints.gather import Gather
from npr_megatron.weights.checkpoints.safetensors_files import file_names, header_bytes
from npr_megatron.weights.checkpoints.torch_dist_files import (
    WrittenEntry,
    write_empty_object,
    write_tensor,
)
from npr_megatron.weights.layouts.megatron_checkpoint import extra_state_keys
from npr_megatron.weights.tiles import RankLayout

MAX_HF_FILE_BYTES = 5_000_000_000
_MAX_PART_BYTES = 1 << 30
_ARCHIVE_BYTES = 2048
"""At most what ``torch.save`` adds to a payload."""

Dtypes = Callable[[str], torch.dtype]
"""The dtype of a storage to be written."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file to be written."""

    file: str
    pieces: tuple[ChunkBox, ...]
    header: bytes | None
    """Of a safetensors file; None: every piece is an archive of its own (``torch_dist``)."""
    objects: tuple[str, ...] = ()
    """Keys of empty objects, after the pieces."""


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """One file that is complete."""

    file: str
    num_bytes: int
    crc32: int
    entries: tuple[WrittenEntry, ...]
    """Its archives, in a ``torch_dist`` part."""


def torch_dist_parts(
    model: ModelConfig,
    rank_layout: RankLayout,
    dtypes: Dtypes,
    shape: ReaderShape,
    max_piece_bytes: int,
) -> list[Part]:
    """Return the part files of a ``torch_dist`` checkpoint.

    Raises:
        LayoutError: ``shape`` does not divide the model; lists every problem.
    """
    widest = max(dtypes(storage.name).itemsize for storage in rank_layout.storages)
    contents: list[list[ChunkBox]] = []
    for group in chunk_groups(model, rank_layout, shape, max_piece_bytes // widest):
        room = 0
        for chunk in group:
            size = _num_bytes(chunk, dtypes)
            if size > room:
                contents.append([])
                room = max(_MAX_PART_BYTES, size)
            contents[-1].append(chunk)
            room -= size
    parts = [Part(f"__{n}_0.distcp", tuple(pieces), None) for n, pieces in enumerate(contents)]
    objects = tuple(extra_state_keys(model))
    return [*parts, Part(f"__{len(parts)}_0.distcp", (), None, objects)]


def safetensors_parts(
    rank_layout: RankLayout, dtypes: Dtypes, max_piece_bytes: int, max_file_bytes: int
) -> list[Part]:
    """Return the weight files of an HF folder, of at most ``max_file_bytes`` (one tensor at
    least)."""
    shapes = {storage.name: storage.shape for storage in rank_layout.storages}
    sizes = {name: math.prod(shape) * dtypes(name).itemsize for name, shape in shapes.items()}
    contents: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not contents:
            contents.append([])
            room = max(max_file_bytes, size)
        contents[-1].append(name)
        room -= size
    parts: list[Part] = []
    for file, names in zip(file_names(contents), contents, strict=True):
        header = header_bytes([(name, shapes[name], dtypes(name)) for name in names])
        pieces = tuple(
            ChunkBox(name, band)
            for name in names
            for band in row_bands(
                Box((0,) * len(shapes[name]), shapes[name]),
                max_piece_bytes // dtypes(name).itemsize,
            )
        )
        parts.append(Part(file, pieces, header))
    return parts


def payload_bytes(part: Part, dtypes: Dtypes) -> int:
    """Return the bytes of weights in ``part``."""
    return sum(_num_bytes(piece, dtypes) for piece in part.pieces)


def _num_bytes(piece: ChunkBox, dtypes: Dtypes) -> int:
    return piece.box.num_elements * dtypes(piece.storage).itemsize


def file_bytes(part: Part, dtypes: Dtypes) -> int:
    """Return the most that the file of ``part`` takes on disk."""
    if part.header is not None:
        return len(part.header) + payload_bytes(part, dtypes)
    num_archives = len(part.pieces) + len(part.objects)
    return payload_bytes(part, dtypes) + num_archives * _ARCHIVE_BYTES


class PieceBuffer:
    """Memory that holds one piece after another.

    Allocated once: an allocator that is asked for each piece anew may keep several.
    """

    def __init__(self, parts: Iterable[Part], dtypes: Dtypes) -> None:
        sizes = [_num_bytes(piece, dtypes) for part in parts for piece in part.pieces]
        self._memory = memoryview(bytearray(max(sizes, default=0)))

    def tensor(self, shape: Index, dtype: torch.dtype) -> Tensor:
        """Return a tensor in this memory, with a storage of its own size; ends the one before."""
        size = math.prod(shape) * dtype.itemsize
        return torch.frombuffer(self._memory[:size], dtype=dtype).view(shape)


def write_part(
    part: Part,
    folder: Path,
    gather: Gather,
    dtypes: Dtypes,
    buffer: PieceBuffer,
    report: Callable[[int], None],
) -> WrittenPart:
    """Write the file of ``part`` and flush it to disk; ``report`` gets the bytes of each piece.

    Raises:
        OSError: the disk is full, or the file cannot be written; a torn file is left.
        InputError: the source cannot be read.
    """
    entries: list[WrittenEntry] = []
    stream = _Stream(folder / part.file)
    try:
        if part.header is not None:
            stream.write(part.header)
        for piece in part.pieces:
            start = stream.tell()
            tensor = buffer.tensor(piece.box.shape, dtypes(piece.storage))
            gather.fill(piece.storage, piece.box, tensor)
            if part.header is not None:
                stream.write(tensor.view(torch.uint8).view(-1).numpy().data)
            else:
                write_tensor(stream, tensor)
                length = stream.tell() - start
                entries.append(WrittenEntry(piece.storage, piece.box, part.file, start, length))
            report(tensor.nbytes)
        for key in part.objects:
            start = stream.tell()
            write_empty_object(stream)
            entries.append(WrittenEntry(key, None, part.file, start, stream.tell() - start))
        stream.flush_to_disk()
    except RuntimeError:
        if stream.failure is not None:  # torch.save hides why its stream failed
            raise stream.failure from None
        raise
    finally:
        stream.close()
    return WrittenPart(part.file, stream.tell(), stream.crc32, tuple(entries))


class _Stream:
    """A file being written from its beginning, with the checksum of what was written."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._size = 0
        self.crc32 = 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Append ``data``, all of it."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                done = os.write(self._descriptor, left)
                self.crc32 = zlib.crc32(left[:done], self.crc32)
                left = left[done:]
                self._size += done
        except OSError as error:
            self.failure = error
            raise
        return size

    def tell(self) -> int:
        """Return the bytes written."""
        return self._size

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def flush_to_disk(self) -> None:
        """Return when the bytes would survive a power cut."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def crc32_of(path: Path) -> int:
    """Return the checksum of a file."""
    value = 0
    for block in _blocks(path):
        value = zlib.crc32(block, value)
    return value


def _blocks(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(size):
            yield block
