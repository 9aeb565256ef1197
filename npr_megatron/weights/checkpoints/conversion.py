"""Turn a checkpoint into one of the other format: HF safetensors <-> Megatron ``torch_dist``.

A conversion is a transfer plan between two layouts, carried out piece by piece from files to files,
so memory is bounded by what is asked for. Each file is flushed and recorded when it is done, and
the folder gets its name when all are: an interrupted conversion continues where it stopped, and
nobody ever sees half a checkpoint. Values are never changed, but for the cast that is asked for.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from npr_megatron.errors import EnvironmentFault, InputError
from npr_megatron.weights.box import Box
from npr_megatron.weights.checkpoints.chunking import ReaderShape, row_bands
from npr_megatron.weights.checkpoints.folders import (
    BACKEND_FILE,
    COMMON_FILE,
    HF_FOLDER,
    is_torch_dist,
    open_checkpoint,
)
from npr_megatron.weights.checkpoints.gather import Gather, Source
from npr_megatron.weights.checkpoints.hf import HfCheckpoint
from npr_megatron.weights.checkpoints.journal import Journal
from npr_megatron.weights.checkpoints.parts import (
    MAX_HF_FILE_BYTES,
    PieceBuffer,
    WrittenPart,
    file_bytes,
    payload_bytes,
    safetensors_parts,
    torch_dist_parts,
    write_part,
)
from npr_megatron.weights.checkpoints.progress import Progress, Report
from npr_megatron.weights.checkpoints.safetensors_files import INDEX_FILE, index_of
from npr_megatron.weights.checkpoints.stored import SCRATCH_BYTES, StoredCheckpoint, StoredTensor
from npr_megatron.weights.checkpoints.torch_dist_files import write_metadata
from npr_megatron.weights.durable import force_to_disk
from npr_megatron.weights.layouts import canonical_layout
from npr_megatron.weights.layouts.megatron_checkpoint import megatron_checkpoint_layout
from npr_megatron.weights.storages import DTYPES, dtype_of
from npr_megatron.weights.tiles import Layout

CHECKSUMS_FILE = "checksums.json"
"""In every folder written here: sizes and CRC-32 of its weight files."""
MIN_MEMORY_BYTES = 32 << 20
_MAX_PIECE_BYTES = 256 << 20
_SPARE_DISK_BYTES = 4 << 20
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


_ONE_RANK = ReaderShape()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to convert to what."""

    source: Path
    target: Path
    reader_shape: ReaderShape = _ONE_RANK
    """Whom the chunks of a ``torch_dist`` target are cut for."""
    memory_bytes: int = 4 << 30
    """Weights in memory at a time, buffers of reading included; not the interpreter itself."""
    dtype: Literal["fp32", "bf16"] | None = None
    """None: as in the source."""
    hf_folder: Path | None = None
    """Where config.json is, for a ``torch_dist`` source that carries none."""
    max_hf_file_bytes: int = MAX_HF_FILE_BYTES


class Conversion:
    """A planned conversion. Nothing is written before :meth:`run`."""

    def __init__(self, request: Request) -> None:
        """Open the source and plan every file of the target.

        Raises:
            InputError: the source is not whole, or the target is there already.
            LayoutError: the model cannot be cut as asked, or tensors of several dtypes meet.
        """
        if request.memory_bytes < MIN_MEMORY_BYTES:
            raise InputError(
                f"{request.memory_bytes} bytes of memory are too few, the least are "
                f"{MIN_MEMORY_BYTES}"
            )
        self._request = request
        self._source = open_checkpoint(request.source, request.hf_folder)
        self._is_to_hf = is_torch_dist(self._source.path)
        self._id = _fingerprint(request, self._source)
        self.is_complete = _is_complete(request.target, self._id)
        if request.target.exists() and not self.is_complete:
            raise InputError(
                f"{request.target} exists and is not what this conversion writes; remove it or "
                "choose another target"
            )
        model = self._source.model
        target = canonical_layout(model) if self._is_to_hf else megatron_checkpoint_layout(model)
        self._target: Layout = target
        self._gather = Gather(_readable(self._source, request), target)
        self._dtypes = {
            storage.name: dtype_of(storage, self._wanted(storage.name))
            for storage in target.ranks[0].storages
        }
        # the rest is for scratch, for what torch.save needs, and for the plan itself
        piece = min((request.memory_bytes - 2 * SCRATCH_BYTES) // 2, _MAX_PIECE_BYTES)
        rank, dtypes = target.ranks[0], self._dtypes.__getitem__
        self._parts = (
            safetensors_parts(rank, dtypes, piece, request.max_hf_file_bytes)
            if self._is_to_hf
            else torch_dist_parts(model, rank, dtypes, request.reader_shape, piece)
        )
        self.num_bytes = sum(payload_bytes(part, dtypes) for part in self._parts)

    def _wanted(self, storage: str) -> torch.dtype:
        if self._request.dtype is not None:
            return DTYPES[self._request.dtype]
        return self._gather.dtype_of(storage)

    def run(self, report: Report) -> None:
        """Write the target; continue if an earlier run of the same conversion was interrupted.

        Raises:
            EnvironmentFault: the disk is or becomes full, or another process does the same.
            InputError: the source cannot be read to its end.
        """
        request = self._request
        if self.is_complete:
            report(Progress(self.num_bytes, self.num_bytes))
            return
        with Journal(request.target, self._id) as journal:
            try:
                self._run(journal, report)
            except OSError as error:
                if error.errno not in _DISK_FULL:
                    raise EnvironmentFault(
                        f"{journal.folder} cannot be written ({error}); finished files are kept"
                    ) from error
                raise EnvironmentFault(
                    f"{request.target.parent} became full ({error.strerror}) while {request.target}"
                    f" was written: {len(journal.finished)} of {len(self._parts)} files are done "
                    "and kept; free some space and give the same command again"
                ) from error

    def _run(self, journal: Journal, report: Report) -> None:
        dtypes = self._dtypes.__getitem__
        left = [part for part in self._parts if part.file not in journal.finished]
        done = self.num_bytes - sum(payload_bytes(part, dtypes) for part in left)
        self._require_room(sum(file_bytes(part, dtypes) for part in left))
        report(Progress(done, self.num_bytes))

        def advance(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            report(Progress(done, self.num_bytes))

        buffer = PieceBuffer(left, dtypes)
        for part in left:
            try:
                written = write_part(part, journal.folder, self._gather, dtypes, buffer, advance)
            except OSError:
                (journal.folder / part.file).unlink(missing_ok=True)
                raise
            journal.finish(written)
        self._complete(journal)

    def _require_room(self, num_bytes: int) -> None:
        parent = self._request.target.parent
        room = shutil.disk_usage(parent).free
        if room < num_bytes + _SPARE_DISK_BYTES:
            raise EnvironmentFault(
                f"{self._request.target} needs {num_bytes + _SPARE_DISK_BYTES} more bytes, "
                f"{parent} has {room} free; free some or choose another target"
            )

    def _complete(self, journal: Journal) -> None:
        """Write the small files and give the folder its name."""
        folder, written = journal.folder, [journal.finished[part.file] for part in self._parts]
        if self._is_to_hf:
            _copy_companions(self._source.hf_folder, folder, self._request.dtype)
            if len(self._parts) > 1:
                names = {
                    part.file: list(dict.fromkeys(piece.storage for piece in part.pieces))
                    for part in self._parts
                }
                _write_json(folder / INDEX_FILE, index_of(names, self.num_bytes))
        else:
            (folder / HF_FOLDER).mkdir(exist_ok=True)
            _copy_companions(self._source.hf_folder, folder / HF_FOLDER, self._request.dtype)
            self._write_metadata(folder, written)
        files = {part.file: {"bytes": part.num_bytes, "crc32": part.crc32} for part in written}
        _write_json(folder / CHECKSUMS_FILE, {"conversion": self._id, "files": files})
        for path in (*folder.rglob("*"), folder):
            force_to_disk(path)
        folder.rename(self._request.target)
        journal.remove()

    def _write_metadata(self, folder: Path, written: list[WrittenPart]) -> None:
        tensors = {
            storage.name: StoredTensor(storage.name, storage.shape, self._dtypes[storage.name], ())
            for storage in self._target.ranks[0].storages
        }
        write_metadata(folder, tensors, [entry for part in written for entry in part.entries])
        common = io.BytesIO()
        torch.save({}, common)
        (folder / COMMON_FILE).write_bytes(common.getvalue())
        backend = {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
        _write_json(folder / BACKEND_FILE, backend)


class _Dequantised:
    """An HF folder in blockwise FP8 as the numbers it stands for."""

    def __init__(self, checkpoint: StoredCheckpoint) -> None:
        self.layout = canonical_layout(checkpoint.model)
        self._numbers = HfCheckpoint(checkpoint.tensors)

    def dtype_of(self, storage: str) -> torch.dtype:
        """Return the dtype of the numbers."""
        del storage
        return torch.float32

    def read(self, rank: int, storage: str, box: Box, into: Tensor) -> None:
        """Fill ``into``, shaped as ``box``, band by band."""
        del rank
        start = (0,) * len(box.start)
        for band in row_bands(box, SCRATCH_BYTES // 16):  # fp32 numbers and scales, each twice
            into[band.moved(box.start, start).slices].copy_(self._numbers.read(storage, band))


def _readable(source: StoredCheckpoint, request: Request) -> Source:
    """Return ``source`` with plain numbers."""
    if not source.is_quantised:
        return source
    if request.dtype is None:
        raise InputError(
            f"{source.path} is in blockwise FP8, in which torch_dist checkpoints do not keep "
            "weights; choose --dtype bf16 or fp32"
        )
    return _Dequantised(source)


def _fingerprint(request: Request, source: StoredCheckpoint) -> str:
    """Return a hash of the request and of the files it reads, as far as their dates tell."""
    files = {chunk.file for tensor in source.tensors.values() for chunk in tensor.chunks}
    files.add(source.hf_folder / "config.json")
    states = [
        (str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in sorted(files)
    ]
    shape = request.reader_shape
    asked = (request.memory_bytes, request.dtype, request.max_hf_file_bytes, shape)
    return hashlib.sha256(repr((asked, states)).encode()).hexdigest()


def _is_complete(target: Path, conversion: str) -> bool:
    """Return whether ``target`` is what this very conversion wrote."""
    try:
        found = json.loads((target / CHECKSUMS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("conversion") == conversion


def _copy_companions(source: Path, target: Path, dtype: str | None) -> None:
    """Copy config.json, the tokenizer and whatever else is small and no weights."""
    for file in sorted(source.iterdir()):
        is_ours = file.name in (INDEX_FILE, CHECKSUMS_FILE) or file.name.startswith(".")
        if file.is_file() and not is_ours and file.suffix not in _WEIGHT_SUFFIXES:
            shutil.copyfile(file, target / file.name)
    if dtype is not None:
        config: dict[str, Any] = json.loads((target / "config.json").read_text(encoding="utf-8"))
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config.pop("quantization_config", None)
        _write_json(target / "config.json", config | {key: _DTYPE_NAMES[dtype]})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
