"""``torch_dist`` folders as stored tensors: torch.distributed.checkpoint files, written and read.

A part file ``__<n>_0.distcp`` is a row of ``torch.save`` archives, one per chunk; ``.metadata``, a
pickle, says which chunk lies where and is written last. Archives are not compressed, so the payload
of a chunk is addressed in place. Only the classes of the format itself are unpickled.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from npr_megatron.weights.box import Box
from npr_megatron.weights.checkpoints.stored import StoredChunk, StoredTensor

METADATA_FILE = ".metadata"
_NOT_WEIGHTS = ("optimizer.", "chained_")
"""What keys of an optimizer's state begin with."""
_PLAIN_CLASSES = {
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
}


def find_torch_dist_tensors(folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return the tensors of a ``torch_dist`` folder but an optimizer's, and one sentence for each
    that cannot be had."""
    try:
        metadata = _read_metadata(folder / METADATA_FILE)
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, ImportError) as error:
        return {}, [f"{folder / METADATA_FILE} cannot be read ({error}); copy the folder again"]
    places: dict[MetadataIndex, Any] = metadata.storage_data or {}
    files = _Files(folder)
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or name.startswith(_NOT_WEIGHTS):
            continue
        chunks: list[StoredChunk] = []
        for chunk in entry.chunks:
            box = Box.at(tuple(chunk.offsets), tuple(chunk.sizes))
            info = places.get(MetadataIndex(name, chunk.offsets))
            try:
                chunks.append(files.locate(box, info, entry.properties.dtype))
            except _BrokenChunkError as error:
                problems.append(f"{name} {box}: {error}")
        tensor = StoredTensor(name, tuple(entry.size), entry.properties.dtype, tuple(chunks))
        covered = sum(chunk.box.num_elements for chunk in chunks)
        whole = Box((0,) * len(tensor.shape), tensor.shape).num_elements
        if len(chunks) == len(entry.chunks) and covered != whole:
            problems.append(f"{name}: chunks hold {covered} elements, expected {whole}")
        tensors[name] = tensor
    files.close()
    return tensors, problems


def damaged_archives(folder: Path) -> Iterator[str]:
    """Yield a sentence for each chunk of weights whose bytes are not those that were saved.

    ``torch.save`` leaves a checksum in every archive. What cannot be read at all is named by
    :func:`find_torch_dist_tensors`.
    """
    metadata = _read_metadata(folder / METADATA_FILE)
    for index, info in (metadata.storage_data or {}).items():
        entry = metadata.state_dict_metadata.get(index.fqn)
        if not isinstance(entry, TensorStorageMetadata) or index.fqn.startswith(_NOT_WEIGHTS):
            continue
        file = folder / info.relative_path
        if not file.exists():
            continue
        with file.open("rb") as opened:
            archive: Any = _Slice(opened, info.offset, info.length)
            try:
                damaged = zipfile.ZipFile(archive).testzip()
            except (zipfile.BadZipFile, EOFError) as error:
                damaged = str(error)
        if damaged is not None:
            yield (
                f"{index.fqn} at {list(index.offset)}: the bytes in {file} are not those that were "
                f"saved ({damaged}); copy it again"
            )


class _BrokenChunkError(Exception):
    """The bytes of a chunk are not there or not readable in place."""


class _Files:
    """The part files of a folder, each opened once and one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = ""
        self._opened: IO[bytes] | None = None
        self._size = 0

    def locate(self, box: Box, info: Any, dtype: torch.dtype) -> StoredChunk:
        """Return where the payload of the archive at ``info`` lies."""
        if info is None:
            raise _BrokenChunkError("no file is named for it; the save was not finished")
        opened = self._open(info.relative_path)
        file = self._folder / info.relative_path
        if info.offset + info.length > self._size:
            raise _BrokenChunkError(
                f"{file} has {self._size} bytes, expected at least {info.offset + info.length}; "
                "the file is truncated, copy it again"
            )
        archive: Any = _Slice(opened, info.offset, info.length)
        try:
            tensor = torch.load(archive, map_location="meta", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise _BrokenChunkError(f"no tensor can be read from {file} ({error})") from error
        payload: Any = tensor.untyped_storage()
        if tuple(tensor.shape) != box.shape or tensor.dtype != dtype:
            raise _BrokenChunkError(
                f"{file} holds {list(tensor.shape)} {tensor.dtype}, expected {list(box.shape)} "
                f"{dtype}"
            )
        if not tensor.is_contiguous():
            raise _BrokenChunkError(f"{file} holds it in no row-major order; save it again")
        start = payload._checkpoint_offset + tensor.storage_offset() * dtype.itemsize
        return StoredChunk(box, file, info.offset + start)

    def _open(self, name: str) -> IO[bytes]:
        if self._opened is None or name != self._name:
            self.close()
            try:
                self._opened = (self._folder / name).open("rb")
            except OSError as error:
                raise _BrokenChunkError(
                    f"{self._folder / name} is missing ({error.strerror}); copy it again"
                ) from error
            self._name = name
            self._size = self._opened.seek(0, io.SEEK_END)
        return self._opened

    def close(self) -> None:
        """Close what is open."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


class _Slice(io.RawIOBase):
    """Part of a file, as a file."""

    def __init__(self, whole: IO[bytes], start: int, length: int) -> None:
        self._whole, self._start, self._length, self._at = whole, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._whole.seek(self._start + self._at)
        found = self._whole.read(min(len(buffer), max(self._length - self._at, 0)))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the class; those of Megatron, which carry no weights, become empty ones."""
        if module.split(".")[0] == "megatron":
            return type(name, (), {})
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if module.startswith("torch.distributed.checkpoint.") or (module, name) in _PLAIN_CLASSES:
            found = None if "." in name else super().find_class(module, name)
            if isinstance(found, type):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the metadata of weights")


def _read_metadata(file: Path) -> Metadata:
    with file.open("rb") as opened:
        metadata = _MetadataUnpickler(opened).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
    return metadata


@dataclass(frozen=True, slots=True)
class WrittenEntry:
    """One archive of a part file."""

    key: str
    box: Box | None
    """None: an object, not a tensor."""
    file: str
    offset: int
    length: int


def write_tensor(stream: Any, tensor: Tensor) -> None:
    """Append one chunk, contiguous and alone in its memory, to a part file open for writing."""
    torch.save(tensor, stream)


def write_empty_object(stream: Any) -> None:
    """Append what Megatron saves for an ``_extra_state`` that is None."""
    torch.save([None], stream)


def write_metadata(
    folder: Path, tensors: Mapping[str, StoredTensor], entries: Sequence[WrittenEntry]
) -> None:
    """Write ``.metadata``; ``tensors`` give shapes and dtypes, their chunks are not looked at."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {name: [] for name in tensors}
    described: dict[str, Any] = {}
    results: list[WriteResult] = []
    for entry in entries:
        index = MetadataIndex(entry.key)
        if entry.box is None:
            described[entry.key] = BytesStorageMetadata()
        else:
            start, size = torch.Size(entry.box.start), torch.Size(entry.box.shape)
            chunks[entry.key].append(ChunkStorageMetadata(start, size))
            index = MetadataIndex(entry.key, start)
        info = _StorageInfo(entry.file, entry.offset, entry.length)
        results.append(WriteResult(index, entry.length, info))
    for name, tensor in tensors.items():
        described[name] = TensorStorageMetadata(
            TensorProperties(dtype=tensor.dtype), torch.Size(tensor.shape), chunks[name]
        )
    FileSystemWriter(folder).finish(Metadata(described), [results])
