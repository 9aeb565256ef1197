"""The process that writes one rank's part of a checkpoint while the rank trains on.

It is forked when the shards are in host memory, so it sees them as they were then. It writes and
digests its file, then leaves a note in the folder. That of rank 0 waits for the notes of all,
writes what belongs to all, and publishes. Ranks take no part: nothing in a save can keep a
collective of the training waiting, and a checkpoint counts as soon as it is whole, not when the
next step begins.

Whatever goes wrong in a writer ends the save and nothing else. A writer ends with its rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import shutil
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.metadata import Metadata

from npr_megatron.errors import EnvironmentFault
from npr_megatron.runtime.child_process import leave_rank
from npr_megatron.train.checkpoint_folder import publish_checkpoint
from npr_megatron.train.checkpoint_manifest import (
    FileRecord,
    Manifest,
    missing_files,
    record_file,
    write_manifest,
)
from npr_megatron.weights.durable import force_to_disk

BACKEND_FILE, COMMON_FILE = "metadata.json", "common.pt"
"""As Megatron names and reads them."""
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_PATIENCE_S = 120.0
"""Longer than network file systems keep an old list of names."""
_PATIENCE = 3.0
"""How much longer than rank 0 another rank may write."""
_LOOK_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Shards:
    """What one rank writes: host memory, planned by Megatron."""

    rank: int
    partial: Path
    transforms: list[Any]
    buckets: list[Any]
    """One per file: path, name, and pairs of what to write and its data."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What rank 0 adds when all have written."""

    world_size: int
    writer: FileSystemWriterAsync
    metadata: Metadata
    common: bytes
    """What is the same on every rank, as ``torch.save`` stores it."""
    manifest: Manifest
    """Without files."""
    keep_last: int


@dataclass(frozen=True, kw_only=True)
class _Note:
    """What a rank tells rank 0: the places of its chunks and its files, or why there are none."""

    results: list[Any] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)
    failure: str = ""


def write_part(shards: Shards, ending: Ending | None, outcome: Connection, parent: int) -> None:
    """Write the part of one rank and publish if it is rank 0; the body of a forked process.

    Args:
        ending: of rank 0; None elsewhere.
        outcome: takes one text: why there is no checkpoint, empty if all went well.
        parent: process id of the rank, whose end is the end of this process.
    """
    leave_rank(parent)
    failure = ""
    try:
        started = time.monotonic()
        note = _write_shards(shards)
        _leave_note(shards.partial, shards.rank, note)
        if ending is not None:
            _finish(shards.partial, ending, own_s=time.monotonic() - started)
    except Exception as error:  # noqa: BLE001 - whatever it was, the rank must hear of it
        failure = str(error) if isinstance(error, EnvironmentFault) else _words(error)
        _clean_up(shards, ending, failure)
    outcome.send(failure)


def report_failure(partial: Path, rank: int, failure: str) -> None:
    """Tell the writer of rank 0 that ``rank`` writes nothing, as far as the disk takes it."""
    with contextlib.suppress(OSError):  # rank 0 has removed the folder, or names who kept silent
        _leave_note(partial, rank, _Note(failure=failure))


def _words(error: BaseException) -> str:
    """Say what happened: what the system said, where torch was the one to stumble over it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    found = cause or error
    return f"{type(found).__name__}: {found}"


def _write_shards(shards: Shards) -> _Note:
    """Write and digest this rank's files."""
    note = _Note()
    for bucket in shards.buckets:
        results: Any = queue.SimpleQueue()
        places: Any = queue.Queue()
        places.put(0)
        FileSystemWriterAsync.write_preloaded_data(
            shards.transforms, 0, bucket, results, places, True
        )
        _, found = results.get()
        if isinstance(found, Exception):
            raise found
        path, name, _ = bucket
        note.results.extend(found)
        note.files[name] = record_file(Path(path))
    return note


def _leave_note(partial: Path, rank: int, note: _Note) -> None:
    path = _note_path(partial, rank)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_bytes(pickle.dumps(note))
    force_to_disk(unfinished)
    unfinished.replace(path)


def _note_path(partial: Path, rank: int) -> Path:
    return partial / f".rank-{rank}"


def _finish(partial: Path, ending: Ending, own_s: float) -> None:
    """Wait for all ranks, write what belongs to all, publish."""
    notes = _gather_notes(partial, ending.world_size, _PATIENCE_S + _PATIENCE * own_s)
    ending.writer.finish(ending.metadata, [note.results for note in notes])
    (partial / COMMON_FILE).write_bytes(ending.common)
    (partial / BACKEND_FILE).write_text(json.dumps(_BACKEND), encoding="utf-8")
    files = {name: record for note in notes for name, record in note.files.items()}
    for rank in range(ending.world_size):
        _note_path(partial, rank).unlink()
    own = sorted(path for path in partial.iterdir() if path.name not in files)
    files |= {path.name: record_file(path) for path in own}
    manifest = replace(ending.manifest, files=dict(sorted(files.items())))
    if unseen := missing_files(partial, manifest):
        raise EnvironmentFault(
            f"{unseen[0]}: rank 0 does not see what another rank wrote; checkpoints go to a file "
            "system that all nodes share"
        )
    write_manifest(partial, manifest)
    publish_checkpoint(partial, manifest.step, ending.keep_last)


def _gather_notes(partial: Path, world_size: int, patience_s: float) -> list[_Note]:
    deadline = time.monotonic() + patience_s
    notes: dict[int, _Note] = {}
    while True:
        present = set(os.listdir(partial))
        for rank in range(world_size):
            path = _note_path(partial, rank)
            if rank not in notes and path.name in present:
                notes[rank] = pickle.loads(path.read_bytes())
                if notes[rank].failure:
                    raise EnvironmentFault(f"rank {rank}: {notes[rank].failure}")
        if len(notes) == world_size:
            return [notes[rank] for rank in range(world_size)]
        if time.monotonic() > deadline:
            silent = [str(rank) for rank in range(world_size) if rank not in notes]
            raise EnvironmentFault(
                f"rank {', '.join(silent[:8])} had not written {patience_s:.0f} s after rank 0"
            )
        time.sleep(_LOOK_S)


def _clean_up(shards: Shards, ending: Ending | None, failure: str) -> None:
    """Give the disk back, and let rank 0 know."""
    if ending is not None:
        shutil.rmtree(shards.partial, ignore_errors=True)
        return
    for path, _, _ in shards.buckets:
        Path(path).unlink(missing_ok=True)
    report_failure(shards.partial, shards.rank, failure)
