"""HF folders as stored tensors: where each lies, what is wrong with the folder, headers to write.

Headers are read here and not through ``safetensors``, which maps whole files into memory. All
deviations from the model are found at once, none is fatal here: whoever opens a checkpoint decides.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from npr_megatron.config.model import ModelConfig
from npr_megatron.weights.box import Box, Index
from npr_megatron.weights.checkpoints.stored import StoredChunk, StoredTensor
from npr_megatron.weights.names import LM_HEAD

INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors itself


def find_hf_tensors(folder: Path, model: ModelConfig) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return the tensors of an HF folder, and one sentence for each that cannot be had.

    The ``lm_head.weight`` that some tied checkpoints store besides the embedding is left out, as
    transformers does.
    """
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for file, expected in _weight_files(folder, problems).items():
        if not file.exists():
            holds = f"; it holds {', '.join(expected[:3])}" if expected else ""
            more = f" and {len(expected) - 3} more tensors" if len(expected) > 3 else ""
            problems.append(f"{file} is missing{holds}{more}; copy it again")
            continue
        try:
            found = {tensor.name: tensor for tensor in tensors_of(file)}
            problems += [
                f"{name} is in two files, one is {file}" for name in found if name in tensors
            ]
            lost = [name for name in expected if name not in found]
            problems += [f"{name} is not in {file}, where the index has it" for name in lost]
            tensors |= found
        except BrokenFileError as error:
            problems.append(str(error))
    if model.tie_word_embeddings:
        tensors.pop(LM_HEAD, None)
    return tensors, problems


class BrokenFileError(Exception):
    """A file does not hold what its header says."""


def _weight_files(folder: Path, problems: list[str]) -> dict[Path, list[str]]:
    """Return the weight files of ``folder`` with the tensors that an index expects in them."""
    index = folder / INDEX_FILE
    if not index.exists():
        return {folder / "model.safetensors": []}
    files: dict[Path, list[str]] = {}
    try:
        owners: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name, file in sorted(owners.items()):
            files.setdefault(folder / file, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{index} is not the index of a checkpoint ({error!r}); copy it again")
        return {}
    return files


def tensors_of(file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of one file.

    Raises:
        BrokenFileError: the file is not what its header says, or has none.
        OSError: it cannot be read.
    """
    size = file.stat().st_size
    header, data = _read_header(file, size)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
            dtype = _DTYPES.get(entry["dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise BrokenFileError(f"{file}: the header of {name} is broken ({error!r})") from error
        if dtype is None:
            raise BrokenFileError(
                f"{name} is {entry['dtype']} in {file}, readable are {', '.join(_DTYPES)}"
            )
        expected = math.prod(shape) * dtype.itemsize
        if stop - start != expected or data + stop > size:
            raise BrokenFileError(
                f"{name} {list(shape)} takes {expected} bytes up to byte {data + start + expected} "
                f"of {file}, which has {size}; the file is truncated or broken, copy it again"
            )
        chunk = StoredChunk(Box((0,) * len(shape), shape), file, data + start)
        yield StoredTensor(name, shape, dtype, (chunk,))


def _read_header(file: Path, size: int) -> tuple[dict[str, Any], int]:
    """Return the header of ``file`` and where its data begin."""
    with file.open("rb") as opened:
        first = opened.read(_LENGTH.size)
        length = _LENGTH.unpack(first)[0] if len(first) == _LENGTH.size else size
        if length > min(size - _LENGTH.size, _MAX_HEADER_BYTES):
            raise BrokenFileError(
                f"{file} has {size} bytes, not even its header is whole; copy it again"
            )
        try:
            header = json.loads(opened.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise BrokenFileError(f"{file} has no readable header ({error})") from error
    if not isinstance(header, dict):
        raise BrokenFileError(f"{file} has a header that is no JSON object; copy it again")
    return header, _LENGTH.size + length


def header_bytes(tensors: Sequence[tuple[str, Index, torch.dtype]]) -> bytes:
    """Return what a file of ``tensors`` begins with; their bytes follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype in tensors:
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def file_names(contents: Sequence[Sequence[str]]) -> list[str]:
    """Return a file name for each list of tensors."""
    if len(contents) == 1:
        return ["model.safetensors"]
    count = len(contents)
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_of(files: Mapping[str, Sequence[str]], total_bytes: int) -> dict[str, Any]:
    """Return the index file of a checkpoint split into ``files``."""
    owners = {name: file for file, names in files.items() for name in names}
    return {"metadata": {"total_size": total_bytes}, "weight_map": owners}
