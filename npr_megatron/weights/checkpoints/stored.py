"""Tensors as they lie in files: boxes read with ``pread``, never a map of the file.

Checkpoints of every format come down to chunks: a box of a tensor, row major, uncompressed, at an
offset of a file. Reading touches about the bytes asked for and takes a fixed scratch buffer beside
the destination, so a reader's memory is known beforehand; mapped files would count into it for as
long as the kernel likes. Deliberately knows no file format.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from npr_megatron.config.model import ModelConfig
from npr_megatron.errors import InputError
from npr_megatron.weights.box import Box, Index
from npr_megatron.weights.tiles import Layout

SCRATCH_BYTES = 8 << 20
"""Bytes that one read holds beside its destination, unless a single row is larger."""
_RUN_BYTES = 4096  # shorter runs are cheaper to read with what lies between them


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """``tensor[box]`` lies contiguous at ``offset`` of ``file``."""

    box: Box
    file: Path
    offset: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in one or more chunks, which are disjoint and cover it."""

    name: str
    shape: Index
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]

    @property
    def num_bytes(self) -> int:
        """Payload."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A model in a folder, of a format that its layout tells."""

    path: Path
    model: ModelConfig
    layout: Layout
    """Of one rank; its storages are the tensors."""
    tensors: Mapping[str, StoredTensor]
    hf_folder: Path
    """Where config.json and the tokenizer are."""

    @property
    def is_quantised(self) -> bool:
        """Whether some of it is in blockwise FP8."""
        return any(tensor.dtype == torch.float8_e4m3fn for tensor in self.tensors.values())

    def read(self, rank: int, storage: str, box: Box, into: Tensor) -> None:
        """Fill ``into``, shaped as ``box``, casting to its dtype; ``rank`` is 0."""
        del rank
        read_box(self.tensors[storage], box, into)

    def dtype_of(self, storage: str) -> torch.dtype:
        """Return the dtype that ``storage`` has in its files."""
        return self.tensors[storage].dtype

    def check(self, digest: int | None) -> None:
        """Do nothing: files that nobody writes to are what they were."""


def read_box(tensor: StoredTensor, box: Box, into: Tensor) -> None:
    """Fill ``into``, shaped as ``box``, from ``tensor[box]``, casting to its dtype.

    Raises:
        InputError: a file is missing or shorter than it must be.
    """
    for chunk in tensor.chunks:
        if (common := chunk.box.intersect(box)) is not None:
            here = common.moved(box.start, (0,) * len(box.start))
            there = common.moved(chunk.box.start, (0,) * len(box.start))
            _read_chunk(tensor, chunk, there, into[here.slices])


def _read_chunk(tensor: StoredTensor, chunk: StoredChunk, box: Box, into: Tensor) -> None:
    """Read a box, in the chunk's own coordinates, matrix by matrix."""
    shape = (1,) * (2 - len(box.start)) + chunk.box.shape
    start = (0,) * (2 - len(box.start)) + box.start
    into = into.view((1,) * (2 - into.dim()) + tuple(into.shape))
    height, width = shape[-2:]
    itemsize = tensor.dtype.itemsize
    try:
        descriptor = os.open(chunk.file, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{tensor.name}: {chunk.file} cannot be read ({error})") from error
    try:
        for lead in product(*map(range, into.shape[:-2])):
            number = 0
            for index, first, extent in zip(lead, start[:-2], shape[:-2], strict=True):
                number = number * extent + first + index
            matrix = _Matrix(
                descriptor,
                chunk.offset + ((number * height + start[-2]) * width + start[-1]) * itemsize,
                width * itemsize,
                f"{tensor.name}: {chunk.file}",
            )
            matrix.read(into[lead], tensor.dtype)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """Rows of a file that begin ``stride`` bytes apart."""

    descriptor: int
    offset: int
    stride: int
    what: str

    def read(self, into: Tensor, dtype: torch.dtype) -> None:
        """Fill ``into`` with as many rows and columns as it has."""
        num_rows, num_columns = into.shape
        run = num_columns * dtype.itemsize
        if dtype == into.dtype and into.is_contiguous() and run == self.stride:
            self._fill(into, self.offset)
            return
        if run < self.stride and run >= _RUN_BYTES:
            row = torch.empty(num_columns, dtype=dtype)
            for number in range(num_rows):
                self._fill(row, self.offset + number * self.stride)
                into[number].copy_(row)
            return
        step = max(1, SCRATCH_BYTES // self.stride)
        band = torch.empty(min(step, num_rows) * self.stride, dtype=torch.uint8)
        for first in range(0, num_rows, step):
            count = min(step, num_rows - first)
            size = (count - 1) * self.stride + run
            self._fill(band[:size], self.offset + first * self.stride)
            rows = band[: count * self.stride].view(dtype).view(count, -1)
            into[first : first + count].copy_(rows[:, :num_columns])

    def _fill(self, into: Tensor, offset: int) -> None:
        """Read exactly the bytes of ``into``, contiguous, from ``offset``."""
        room = into.view(torch.uint8).view(-1).numpy().data
        done = 0
        while done < len(room):
            found = os.preadv(self.descriptor, [room[done:]], offset + done)
            if found == 0:
                raise InputError(
                    f"{self.what} ends at {os.fstat(self.descriptor).st_size} bytes, expected at "
                    f"least {offset + len(room)}; it is truncated, copy it again"
                )
            done += found
