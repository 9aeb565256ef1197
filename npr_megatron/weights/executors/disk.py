"""Versions of weights in a folder: for cold starts, joiners far away, and audits.

::

    <root>/v000000000012/rank00000.safetensors    one file per source rank, in its own layout
                         manifest.json            what the files must be; written last
    <root>/.v000000000012.partial/                a version in the making; nobody reads it

Each source rank writes its shard, one of them seals the version: the folder appears under its name
complete, and on disk, or not at all. A destination reads only the bytes that its plan names,
digests what it holds and compares with the manifest; the whole files are looked at only when that
fails, to name what is wrong. Replicas are written by every rank that holds them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npr_megatron.errors import InputError, StaleWeightsError
from npr_megatron.weights.checkpoints.stored import read_box
from npr_megatron.weights.digest import census_of
from npr_megatron.weights.durable import force_to_disk
from npr_megatron.weights.executors.shard_file import (
    ShardFile,
    cannot_write,
    open_shard,
    shard_faults,
    write_shard_file,
)
from npr_megatron.weights.executors.versions import VersionReader, listed
from npr_megatron.weights.publication import Publication, RankPublication
from npr_megatron.weights.storages import check_storages
from npr_megatron.weights.tiles import Layout

_MANIFEST = "manifest.json"
_COMPLETE = re.compile(r"v(\d{12})")
_PARTIAL = re.compile(r"\.v(\d{12})\.(partial|retired)")


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A written shard, as its rank reports it to whoever seals the version."""

    publication: RankPublication
    file: ShardFile


@dataclass(frozen=True, slots=True)
class DiskVersion:
    """What a folder must hold."""

    publication: Publication
    files: tuple[ShardFile, ...]
    """One per source rank, in rank order."""


def write_shard(
    root: str | Path,
    layout: Layout,
    rank: int,
    version: int,
    storages: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> ShardRecord:
    """Write the storages of source rank ``rank``; nobody sees them before the version is sealed.

    Args:
        dtype: of the weights on disk; storages that have another one are cast, unless pinned.

    Raises:
        StaleWeightsError: the version exists.
        LayoutError: ``storages`` are not those of the layout.
        EnvironmentFault: disk full or not writable; names file and tensor, nothing is left.
    """
    root = Path(root)
    _require_new(root, version)
    check_storages(layout.ranks[rank], storages)
    path = _partial(root, version) / f"rank{rank:05d}.safetensors"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, "its folder", error, 0) from error
    try:
        file = write_shard_file(path, layout.ranks[rank], dtype, storages)
    finally:
        with suppress(OSError):
            path.parent.rmdir()  # succeeds if it is empty: the write failed, no other rank is there
    publication = RankPublication(
        version=version,
        source_layout_id=layout.layout_id,
        rank=rank,
        dtype=str(dtype),
        arena_path=path.name,
        digest_shares=census_of(layout).sum_tiles(rank, file.tile_digests),
    )
    return ShardRecord(publication, file)


def seal(root: str | Path, records: Sequence[ShardRecord], *, keep_last: int) -> Path:
    """Make a version visible whose shards are all written; return its folder.

    Afterwards the newest ``keep_last`` (at least 1) versions are left and no older attempt.

    Raises:
        StaleWeightsError: ranks are missing or disagree, or the version exists.
        DivergenceError: replicas differ between source ranks.
        EnvironmentFault: disk full or not writable; the version stays invisible.
    """
    root = Path(root)
    publication = Publication.assemble([record.publication for record in records])
    _require_new(root, publication.version)
    files = sorted((record.file for record in records), key=lambda file: file.name)
    partial, final = _partial(root, publication.version), _folder(root, publication.version)
    manifest = partial / _MANIFEST
    try:
        for path in partial.iterdir():  # what an attempt with more ranks left
            if path.name not in publication.arena_paths:
                path.unlink()
        with manifest.open("w", encoding="utf-8") as file:
            json.dump(_as_json(DiskVersion(publication, tuple(files))), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        force_to_disk(partial)
        partial.rename(final)
        force_to_disk(root)
    except OSError as error:
        manifest.unlink(missing_ok=True)
        raise cannot_write(manifest, "the manifest", error, 0) from error
    _retire(root, publication.version, keep_last)
    return final


def versions_on_disk(root: str | Path) -> list[Path]:
    """Return the folders of complete versions, oldest first."""
    found = Path(root).iterdir() if Path(root).is_dir() else ()
    return sorted(path for path in found if _COMPLETE.fullmatch(path.name))


def is_version(folder: str | Path) -> bool:
    """Return whether ``folder`` is a complete version."""
    return (Path(folder) / _MANIFEST).is_file()


def read_manifest(folder: str | Path) -> DiskVersion:
    """Return what ``folder`` must hold.

    Raises:
        InputError: there is no readable manifest.
    """
    path = Path(folder) / _MANIFEST
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(
            ShardFile(**{**file, "tile_digests": tuple(int(d, 16) for d in file["tile_digests"])})
            for file in content["files"]
        )
        publication = {
            **content["publication"],
            "digest": int(content["publication"]["digest"], 16),
        }
        publication["arena_paths"] = tuple(publication["arena_paths"])
        return DiskVersion(Publication(**publication), files)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{path} is not the manifest of a version of weights ({error!r}); choose another folder"
        ) from error


class DiskReceiver:
    """The destination side, one per destination rank."""

    def __init__(self, source: Layout, target: Layout, target_rank: int = 0) -> None:
        """Plan the transfer and prove the plan.

        Raises:
            LayoutError: the layouts are not of the same model.
        """
        self._reader = VersionReader(source, target, target_rank)

    def pull(self, folder: str | Path, into: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Fill ``into`` from a version on disk and return this rank's digest shares.

        With a single destination rank they are checked here; otherwise collect the shares of all
        ranks and check them with ``read_manifest(folder).publication``.

        Raises:
            InputError: the manifest or a shard is missing, truncated or not what it must be.
            StaleWeightsError: another layout, or the digest is wrong; names tensors and files.
            LayoutError: ``into`` is not laid out, or not of the dtype, as asked.
        """
        publication = read_manifest(folder).publication
        dtype = self._reader.check(publication, into)
        shards = {
            rank: open_shard(
                Path(folder) / publication.arena_paths[rank], self._reader.source.ranks[rank], dtype
            )
            for rank in self._reader.source_ranks
        }
        for copy in self._reader.copies:
            region = into[copy.target_storage][copy.target_box.slices]
            region = region.view(copy.source_box.shape)
            on_host = torch.empty_like(region, device="cpu") if region.is_cuda else region
            read_box(shards[copy.source_rank][copy.source_storage], copy.source_box, on_host)
            if region.is_cuda:
                region.copy_(on_host)
        shares = self._reader.shares(into)
        if self._reader.is_alone and not publication.matches([shares]):
            try:
                publication.check([shares])
            except StaleWeightsError as error:
                raise StaleWeightsError(f"{error}; {listed(self.faults(folder, dtype))}") from error
        return shares

    def faults(self, folder: str | Path, dtype: torch.dtype) -> list[str]:
        """Return what is wrong with the files that this rank reads, one phrase per tensor."""
        version = read_manifest(folder)
        return [
            fault
            for rank in self._reader.source_ranks
            for fault in shard_faults(
                Path(folder) / version.files[rank].name,
                self._reader.source.ranks[rank],
                dtype,
                version.files[rank],
            )
        ]


def _as_json(version: DiskVersion) -> dict[str, Any]:
    """Return plain values; 64-bit numbers as text, because JSON readers may round them."""
    content = asdict(version)
    content["publication"]["digest"] = f"{version.publication.digest:016x}"
    for file in content["files"]:
        file["tile_digests"] = [f"{digest:016x}" for digest in file["tile_digests"]]
    return content


def _folder(root: Path, version: int) -> Path:
    return root / f"v{version:012d}"


def _partial(root: Path, version: int) -> Path:
    return root / f".v{version:012d}.partial"


def _require_new(root: Path, version: int) -> None:
    if _folder(root, version).exists():
        raise StaleWeightsError(
            f"version {version} was to be written, {_folder(root, version)} exists; versions are "
            "written once, choose a higher number or remove it"
        )


def _retire(root: Path, newest: int, keep_last: int) -> None:
    """Delete what is not kept; a version steps out of sight before its files go."""
    for path in versions_on_disk(root)[:-keep_last]:
        shutil.rmtree(path.rename(root / f".{path.name}.retired"))
    for path in root.iterdir():
        if (found := _PARTIAL.fullmatch(path.name)) and int(found.group(1)) < newest:
            shutil.rmtree(path)
