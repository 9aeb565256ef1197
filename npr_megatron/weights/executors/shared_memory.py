"""Weights from trainer ranks to engines of the same node: source writes once, destinations pull.

The source fills its arena and goes on training; each destination copies what its plan names
straight from the mapped arenas into its staging tensors, whenever it likes: a late joiner costs the
source nothing. An engine that publishes its own storages is such a source, too: its peers catch up
from it when the trainer is gone, and the digest is that of the version whoever holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from npr_megatron.weights.executors.arena import Arena, OwnedArena, arena_path
from npr_megatron.weights.executors.slots import Slots
from npr_megatron.weights.executors.versions import Fill, VersionReader, VersionWriter
from npr_megatron.weights.publication import Publication, RankPublication
from npr_megatron.weights.tiles import Layout


class Publisher:
    """The source side, one per source rank."""

    def __init__(
        self,
        layout: Layout,
        rank: int,
        dtype: torch.dtype,
        *,
        run_id: str,
        arena_dir: str | Path,
    ) -> None:
        """Reserve the arena of ``rank``: room for two versions in ``dtype``.

        ``layout`` is what is served and ``dtype`` that of the engines; a trainer of another dtype
        is cast once, here.

        Raises:
            EnvironmentFault: no room in ``arena_dir``, or a living run of this name is there.
        """
        self._writer = VersionWriter(layout, rank, dtype)
        self._arena = OwnedArena(arena_path(arena_dir, run_id, rank), layout.ranks[rank], dtype)

    def publish(self, version: int, storages: Mapping[str, Tensor]) -> RankPublication:
        """Copy this rank's storages into the arena as ``version``; then they may change again.

        The version before stays readable, the one before that does not.

        Raises:
            StaleWeightsError: ``version`` is not above the last one.
            LayoutError: ``storages`` are not those of the layout.
        """
        fill = self._writer.copy_of(storages)
        return self._writer.write(
            version, fill, self._arena.slots, str(self._arena.path), original=storages
        )

    def publish_with(self, version: int, fill: Fill) -> RankPublication:
        """Have ``fill`` write ``version`` into the arena: casts and quantises without another copy.

        Raises:
            StaleWeightsError: ``version`` is not above the last one.
        """
        return self._writer.write(version, fill, self._arena.slots, str(self._arena.path))

    def close(self) -> None:
        """Delete the arena; readers in the middle of a copy keep their mapping."""
        self._arena.close()


class Receiver:
    """The destination side, one per destination rank. Keeps the arenas mapped between pulls."""

    def __init__(self, source: Layout, target: Layout, target_rank: int = 0) -> None:
        """Plan the transfer and prove the plan.

        Raises:
            LayoutError: the layouts are not of the same model.
        """
        self._reader = VersionReader(source, target, target_rank)
        self._arenas: dict[str, Arena] = {}

    def pull(self, publication: Publication, into: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Fill ``into`` with the published weights and return this rank's digest shares.

        With a single destination rank they are checked here; otherwise collect the shares of all
        ranks and call ``publication.check``. On an error ``into`` holds garbage.

        Args:
            into: staging storages of this rank, of the publication's dtype; written in place.

        Raises:
            StaleWeightsError: the version is gone, was overwritten while being read, is of another
                layout, or did not arrive as published in two attempts (names the tensors).
            LayoutError: ``into`` is not laid out, or not of the dtype, as asked.
        """
        dtype = self._reader.check(publication, into)
        return self._reader.read(publication, self._sources(publication, dtype), into)

    def faults(self, publication: Publication, into: Mapping[str, Tensor]) -> list[str]:
        """Return which tensors differ from the publication, one phrase each.

        For the ranks of an engine whose digest, added up over its ranks, is wrong.

        Raises:
            StaleWeightsError: the version is gone or of another layout.
        """
        dtype = self._reader.check(publication, into)
        return self._reader.faults(publication, self._sources(publication, dtype), into)

    def close(self) -> None:
        """Drop the mappings."""
        self._arenas.clear()

    def _sources(self, publication: Publication, dtype: torch.dtype) -> dict[int, Slots]:
        """Return the arenas of the source ranks, mapped anew where a file was replaced."""
        slots: dict[int, Slots] = {}
        for rank in self._reader.source_ranks:
            path = publication.arena_paths[rank]
            arena = self._arenas.get(path)
            if arena is None or not arena.is_at(path):
                arena = Arena(path, self._reader.source.ranks[rank], dtype)
                self._arenas[path] = arena
            slots[rank] = arena.slots
        return slots
