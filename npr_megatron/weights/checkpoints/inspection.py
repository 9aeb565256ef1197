"""Whether a checkpoint can be trusted: every byte is read, every deviation named.

Names, shapes, dtypes and completeness come from headers (``checkpoint_folders``). Here the values
follow: they can be read, are finite, are those of the checksums if there are any, and two copies of
one parameter agree. Nothing is written and nothing is repaired.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from npr_megatron.errors import InputError
from npr_megatron.weights.box import Box
from npr_megatron.weights.checkpoints.chunking import row_bands
from npr_megatron.weights.checkpoints.comparison import BAND_BYTES
from npr_megatron.weights.checkpoints.conversion import CHECKSUMS_FILE
from npr_megatron.weights.checkpoints.folders import examine_checkpoint
from npr_megatron.weights.checkpoints.parts import crc32_of
from npr_megatron.weights.checkpoints.progress import Progress, Report
from npr_megatron.weights.checkpoints.safetensors_files import BrokenFileError, tensors_of
from npr_megatron.weights.checkpoints.stored import StoredCheckpoint, StoredTensor, read_box
from npr_megatron.weights.checkpoints.torch_dist_files import METADATA_FILE, damaged_archives
from npr_megatron.weights.digest import digest_box
from npr_megatron.weights.executors.disk import is_version, read_manifest
from npr_megatron.weights.executors.shard_file import sha256_of
from npr_megatron.weights.tiles import Tile


@dataclass(frozen=True, slots=True)
class Finding:
    """What is to be said about a checkpoint."""

    kind: str
    """``canonical`` (an HF folder), ``torch_dist`` or ``version`` (written for engines)."""
    num_tensors: int
    num_bytes: int
    dtypes: tuple[str, ...]
    digest: int | None
    """Of all weights (``weights.digest``); None where not all could be read. Of a version, which
    does not say where its elements belong, the one it was published with."""
    problems: tuple[str, ...]
    """One sentence each; empty: the checkpoint is good."""


def inspect_checkpoint(path: Path, hf_folder: Path | None, report: Report) -> Finding:
    """Read the checkpoint or published version at ``path`` to its last byte.

    Raises:
        InputError: it is no checkpoint at all, or its architecture is not known.
    """
    if is_version(path):
        return _inspect_version(path, report)
    checkpoint, problems = examine_checkpoint(path, hf_folder)
    problems += _checksum_problems(checkpoint.path, problems)
    readable = [
        tile
        for tile in checkpoint.layout.ranks[0].tiles
        if tile.storage in checkpoint.tensors and _fits(tile, checkpoint)
    ]
    reader = _Reader(checkpoint, report, sum(tile.box.num_elements for tile in readable))
    for tile in readable:
        reader.read(tile)
    problems += reader.problems()
    is_complete = not problems and len(readable) == len(checkpoint.layout.ranks[0].tiles)
    tensors = checkpoint.tensors.values()
    return Finding(
        kind=checkpoint.layout.kind,
        num_tensors=len(tensors),
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        dtypes=tuple(sorted({str(tensor.dtype) for tensor in tensors})),
        digest=reader.digest if is_complete else None,
        problems=tuple(problems),
    )


def _fits(tile: Tile, checkpoint: StoredCheckpoint) -> bool:
    shape = checkpoint.tensors[tile.storage].shape
    box = tile.storage_box
    return len(shape) == len(box.stop) and all(
        stop <= extent for stop, extent in zip(box.stop, shape, strict=True)
    )


def _inspect_version(folder: Path, report: Report) -> Finding:
    """Read a version as ``executors.disk`` writes it: one file per source rank, and a manifest."""
    version = read_manifest(folder)
    total = sum(file.num_bytes for file in version.files)
    tensors: list[StoredTensor] = []
    problems: list[str] = []
    done = 0
    for expected in version.files:
        file = folder / expected.name
        try:
            held = list(tensors_of(file))
        except (OSError, BrokenFileError) as error:
            problems.append(f"{error}; copy it again")
            continue
        found = sha256_of(file)
        if found != expected.sha256:
            problems.append(
                f"{file} has SHA-256 {found}, expected {expected.sha256}; copy it again"
            )
        problems += [problem for tensor in held for problem in _value_problems(tensor)]
        tensors += held
        done += expected.num_bytes
        report(Progress(done, total))
    return Finding(
        kind="version",
        num_tensors=len(tensors),
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        dtypes=tuple(sorted({str(tensor.dtype) for tensor in tensors})),
        digest=None if problems else version.publication.digest,
        problems=tuple(problems),
    )


def _value_problems(tensor: StoredTensor) -> Iterator[str]:
    whole = Box((0,) * len(tensor.shape), tensor.shape)
    count = 0
    for box in row_bands(whole, BAND_BYTES // tensor.dtype.itemsize):
        values = torch.empty(box.shape, dtype=tensor.dtype)
        read_box(tensor, box, values)
        count += int((~torch.isfinite(values.float())).sum())
    if count:
        file = tensor.chunks[0].file
        yield f"{tensor.name} in {file}: {count} values are not finite, expected none"


class _Reader:
    """Reads tiles and keeps what was found."""

    def __init__(self, checkpoint: StoredCheckpoint, report: Report, num_elements: int) -> None:
        self._checkpoint, self._report, self._total = checkpoint, report, num_elements
        self._done = 0
        self._non_finite: defaultdict[str, int] = defaultdict(int)
        self._unreadable: dict[str, None] = {}
        self._copies: dict[tuple[str, Box], tuple[str, int]] = {}
        self._disagreeing: list[str] = []
        self.digest = 0

    def read(self, tile: Tile) -> None:
        """Digest one tile and look at its values."""
        tensor = self._checkpoint.tensors[tile.storage]
        share = 0
        for box in row_bands(tile.box, BAND_BYTES // tensor.dtype.itemsize):
            values = torch.empty(box.shape, dtype=tensor.dtype)
            lead = len(tile.at) - len(box.start)
            inner = box.moved(tile.box.start, tile.at[lead:])
            first = tile.at[:lead]
            there = Box(first + inner.start, tuple(a + 1 for a in first) + inner.stop)
            try:
                self._checkpoint.read(0, tile.storage, there, values.view(there.shape))
            except InputError as error:
                self._unreadable[str(error)] = None
                return
            self._non_finite[tile.parameter] += int((~torch.isfinite(values.float())).sum())
            share += digest_box(tile.parameter, box, values)
            self._done += box.num_elements
            self._report(Progress(self._done, self._total))
        self._count(tile, share % 2**64)

    def _count(self, tile: Tile, share: int) -> None:
        """Add a tile to the digest once, and compare the copies of it."""
        key = (tile.parameter, tile.box)
        if key not in self._copies:
            self._copies[key] = (tile.storage, share)
            self.digest = (self.digest + share) % 2**64
        elif self._copies[key][1] != share:
            self._disagreeing.append(
                f"{tile.parameter} {tile.box} differs between its copies "
                f"{self._copies[key][0]} and {tile.storage}"
            )

    def problems(self) -> list[str]:
        """Return one sentence per finding."""
        return [
            *self._unreadable,
            *self._disagreeing,
            *(
                f"{name}: {count} values are not finite, expected none"
                for name, count in self._non_finite.items()
                if count
            ),
        ]


def _checksum_problems(folder: Path, known: Iterable[str]) -> list[str]:
    """Compare files with what their writer recorded; ``known`` names files that are missing."""
    file = folder / CHECKSUMS_FILE
    if not file.exists():
        return list(damaged_archives(folder)) if (folder / METADATA_FILE).exists() else []
    try:
        files: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["files"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
        return [f"{file} cannot be read ({error!r}); copy the folder again"]
    problems: list[str] = []
    for name, expected in files.items():
        path = folder / name
        if not path.exists():
            if not any(str(path) in problem for problem in known):
                problems.append(f"{path} is missing; copy it again")
            continue
        size = path.stat().st_size
        if size != expected["bytes"]:
            problems.append(f"{path} has {size} bytes, expected {expected['bytes']}; copy it again")
        elif (found := crc32_of(path)) != expected["crc32"]:
            problems.append(
                f"{path} has checksum {found:08x}, expected {expected['crc32']:08x}; copy it again"
            )
    return problems
