"""Weights from trainer ranks to engines of the same node: source writes once, destinations pull.

The source copies its storages into its arena and goes on training; each destination copies what its
plan names straight from the mapped arenas into its staging tensors, whenever it likes: a late
joiner costs the source nothing. Nothing is served on trust: the destination digests what it holds
and compares with the publication.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from npr_megatron.errors import LayoutError, StaleWeightsError
from npr_megatron.weights.arena import NUM_SLOTS, Arena, OwnedArena, SlotHeader, arena_path
from npr_megatron.weights.digest import Census
from npr_megatron.weights.executors.inproc import copy_boxes
from npr_megatron.weights.plan import plan_transfer
from npr_megatron.weights.publication import Publication, RankPublication
from npr_megatron.weights.storages import check_storages
from npr_megatron.weights.tiles import Layout
from npr_megatron.weights.verify import verify_transfer


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

        ``dtype`` is that of the engines; a trainer of another dtype is cast once, here.

        Raises:
            EnvironmentFault: no room in ``arena_dir``, or a living run of this name is there.
        """
        self._layout = layout
        self._rank = rank
        self._dtype = dtype
        self._census = Census(layout)
        self._arena = OwnedArena(arena_path(arena_dir, run_id, rank), layout.ranks[rank], dtype)

    @torch.no_grad()
    def publish(self, version: int, storages: Mapping[str, Tensor]) -> RankPublication:
        """Copy this rank's storages into the arena as ``version``; then they may change again.

        The version before stays readable, the one before that does not.

        Raises:
            StaleWeightsError: ``version`` is not above the last one.
            LayoutError: ``storages`` are not those of the layout.
        """
        if version <= self._arena.version:
            raise StaleWeightsError(
                f"version {version} was to be published after version {self._arena.version}; "
                "versions must grow from 0"
            )
        check_storages(self._layout.ranks[self._rank], storages)
        views = self._arena.begin()
        for name, view in views.items():
            view.copy_(storages[name])
        shares = self._census.shares(self._rank, views)
        header = SlotHeader(version, self._layout.layout_id, str(self._dtype), shares[0])
        self._arena.finish(header)
        return RankPublication(
            version=version,
            source_layout_id=header.layout_id,
            rank=self._rank,
            dtype=header.dtype,
            arena_path=str(self._arena.path),
            digest_shares=shares,
        )

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
        plan = plan_transfer(source, target)
        if problems := verify_transfer(plan, source, target):
            raise LayoutError("the planned transfer is wrong:\n" + "\n".join(problems))
        self._source, self._target, self._rank = source, target, target_rank
        self._copies = plan.copies_to(target_rank)
        self._sources = sorted({copy.source_rank for copy in self._copies})
        self._census = Census(target)
        self._arenas: dict[str, Arena] = {}

    def pull(self, publication: Publication, into: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Fill ``into`` with the published weights and return this rank's digest shares.

        With a single destination rank they are checked here; otherwise collect the shares of all
        ranks and call ``publication.check``. On an error ``into`` holds garbage.

        Args:
            into: staging storages of this rank, of the publication's dtype; written in place.

        Raises:
            StaleWeightsError: the version is gone, was overwritten while being read, is of another
                layout, or did not arrive as published.
            LayoutError: ``into`` is not laid out, or not of the dtype, as asked.
        """
        self._check(publication, into)
        dtype = next(iter(into.values())).dtype
        arenas = {rank: self._map(publication, rank, dtype) for rank in self._sources}
        slots = {rank: _find(arena, publication) for rank, arena in arenas.items()}
        before = {rank: arena.header(slots[rank]) for rank, arena in arenas.items()}
        views = {rank: arena.storages(slots[rank]) for rank, arena in arenas.items()}
        copy_boxes(self._copies, views, {self._rank: into})
        if before != {rank: arena.header(slots[rank]) for rank, arena in arenas.items()}:
            raise StaleWeightsError(
                f"version {publication.version} was overwritten while it was read; pull the newest"
            )
        shares = self._census.shares(self._rank, into)
        if len(self._target.ranks) == 1:
            publication.check([shares])
        return shares

    def close(self) -> None:
        """Drop the mappings."""
        self._arenas.clear()

    def _check(self, publication: Publication, into: Mapping[str, Tensor]) -> None:
        if publication.source_layout_id != self._source.layout_id:
            raise StaleWeightsError(
                f"version {publication.version} was published from layout "
                f"{publication.source_layout_id}, expected was {self._source.layout_id}; the "
                "trainer was laid out anew, start a receiver for its layout"
            )
        check_storages(self._target.ranks[self._rank], into)
        found = str(next(iter(into.values())).dtype)
        if found != publication.dtype:
            raise LayoutError(
                f"weights are published in {publication.dtype}, the receiver holds {found}; "
                "publish in the dtype of the engines"
            )

    def _map(self, publication: Publication, rank: int, dtype: torch.dtype) -> Arena:
        """Return the arena of a source rank, mapped anew if its file was replaced."""
        path = publication.arena_paths[rank]
        arena = self._arenas.get(path)
        if arena is None or not arena.is_at(path):
            arena = Arena.open(path, self._source.ranks[rank], dtype)
            self._arenas[path] = arena
        return arena


def _find(arena: Arena, publication: Publication) -> int:
    """Return the slot of ``arena`` that holds the published version."""
    held = [arena.header(slot) for slot in range(NUM_SLOTS)]
    for slot, header in enumerate(held):
        if header.version == publication.version and (
            header.layout_id == publication.source_layout_id
        ):
            return slot
    raise StaleWeightsError(
        f"version {publication.version} is asked for, the arena holds versions "
        f"{sorted(header.version for header in held)}; pull the newest publication"
    )
