"""Publish a version into slots, pull a version out of slots: the same for host and device memory.

Nothing is served on trust. The source keeps the digest of every tile beside the bytes; a receiver
digests what it holds. If that is not what was published, it reads once more, and if that does not
help it says which tensors are wrong: those whose source bytes changed since they were published,
and those that did not arrive as they are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from npr_megatron.errors import LayoutError, StaleWeightsError
from npr_megatron.weights.digest import census_of
from npr_megatron.weights.executors.inproc import moves_of, run_moves
from npr_megatron.weights.executors.slots import SlotHeader, Slots
from npr_megatron.weights.plans.copies import Copy
from npr_megatron.weights.plans.plan import TransferPlan, plan_transfer
from npr_megatron.weights.proof.verify import verify_transfer
from npr_megatron.weights.publication import Publication, RankPublication
from npr_megatron.weights.storages import check_storages, weights_dtype
from npr_megatron.weights.tiles import Layout

Fill = Callable[[Mapping[str, Tensor]], None]
"""Writes every element of the storages it is given, in their dtypes."""

_NAMES_SHOWN = 8


class VersionWriter:
    """Writes the versions of one source rank, to one set of slots in turn.

    What it wrote it knows by itself: shared memory may be damaged.
    """

    def __init__(self, layout: Layout, rank: int, dtype: torch.dtype) -> None:
        self._layout, self._rank, self._dtype = layout, rank, dtype
        self._census = census_of(layout)
        self._version = -1
        self._num_written = 0

    @torch.no_grad()
    def write(
        self,
        version: int,
        fill: Fill,
        slots: Slots,
        address: str,
        original: Mapping[str, Tensor] | None = None,
    ) -> RankPublication:
        """Have ``fill`` write the oldest slot and declare it to be ``version``.

        If ``fill`` fails, what was the oldest version is gone and all others stay.

        Args:
            original: what ``fill`` copies; where it has the dtype that is served, its digest is the
                published one, so that damage to the slot shows from the first byte on.

        Raises:
            StaleWeightsError: ``version`` is not above the last one.
        """
        if version <= self._version:
            raise StaleWeightsError(
                f"version {version} was to be published after version {self._version}; "
                "versions must grow from 0"
            )
        slot = self._num_written % slots.num_slots
        slots.begin(slot)
        views = slots.storages(slot)
        fill(views)
        is_copy = original is not None and all(
            original[name].dtype == view.dtype for name, view in views.items()
        )
        held = original if original is not None and is_copy else views
        digests = self._census.tile_digests(self._rank, held)
        shares = self._census.sum_tiles(self._rank, digests)
        header = SlotHeader(version, self._layout.layout_id, str(self._dtype), shares[0])
        slots.finish(slot, header, digests)
        self._version, self._num_written = version, self._num_written + 1
        return RankPublication(
            version=version,
            source_layout_id=header.layout_id,
            rank=self._rank,
            dtype=header.dtype,
            arena_path=address,
            digest_shares=shares,
        )

    def copy_of(self, storages: Mapping[str, Tensor]) -> Fill:
        """Return the filling that copies ``storages``, cast once where dtypes differ.

        Raises:
            LayoutError: ``storages`` are not those of the layout.
        """
        check_storages(self._layout.ranks[self._rank], storages)

        def fill(views: Mapping[str, Tensor]) -> None:
            for name, view in views.items():
                view.copy_(storages[name])

        return fill


class VersionReader:
    """Reads versions for one target rank."""

    def __init__(self, source: Layout, target: Layout, target_rank: int) -> None:
        """Plan the transfer and prove the plan.

        Raises:
            LayoutError: the layouts are not of the same model.
        """
        plan = _proven_plan(source, target)
        self.source, self._target, self._rank = source, target, target_rank
        self.copies = plan.copies_to(target_rank)
        self._moves = moves_of(self.copies)
        # every rank pulls by itself, so what is shared is what one rank holds several times
        self._shares = moves_of(plan.shares_to(target_rank))
        self.source_ranks = sorted({copy.source_rank for copy in self.copies})
        self._census = census_of(target)

    def shares(self, into: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Return this rank's digest shares of what ``into`` holds."""
        return self._census.shares(self._rank, into)

    @property
    def is_alone(self) -> bool:
        """Whether this rank's shares are the digest of the whole target."""
        return len(self._target.ranks) == 1

    def check(self, publication: Publication, into: Mapping[str, Tensor]) -> torch.dtype:
        """Require a publication of the source layout and staging that fits; return the dtype.

        Raises:
            StaleWeightsError: the publication is of another layout.
            LayoutError: ``into`` is not laid out, or not of the dtype, as published.
        """
        if publication.source_layout_id != self.source.layout_id:
            raise StaleWeightsError(
                f"version {publication.version} was published from layout "
                f"{publication.source_layout_id}, expected was {self.source.layout_id}; the "
                "trainer was laid out anew, start a receiver for its layout"
            )
        rank_layout = self._target.ranks[self._rank]
        check_storages(rank_layout, into)
        dtype = weights_dtype(rank_layout, into)
        if dtype is None or str(dtype) != publication.dtype:
            raise LayoutError(
                f"weights are published in {publication.dtype}, the receiver holds {dtype}; "
                "publish in the dtype of the engines"
            )
        return dtype

    def read(
        self, publication: Publication, sources: Mapping[int, Slots], into: Mapping[str, Tensor]
    ) -> tuple[int, ...]:
        """Fill ``into`` and return this rank's digest shares; checks them if it is the only rank.

        Raises:
            StaleWeightsError: the version is gone, was overwritten while being read, or did not
                arrive as published in two attempts; the message names tensors.
        """
        shares = self._read_once(publication, sources, into)
        if not self.is_alone or publication.matches([shares]):
            return shares
        shares = self._read_once(publication, sources, into)
        if not publication.matches([shares]):
            found = self.faults(publication, sources, into)
            try:
                publication.check([shares])
            except StaleWeightsError as error:
                raise StaleWeightsError(f"{error}; read twice, {listed(found)}") from error
        return shares

    def faults(
        self, publication: Publication, sources: Mapping[int, Slots], into: Mapping[str, Tensor]
    ) -> list[str]:
        """Return what differs from the publication, one phrase per tensor; reads everything again.

        Raises:
            StaleWeightsError: the version is gone or was overwritten meanwhile.
        """
        slots = {rank: find_slot(held, publication) for rank, held in sources.items()}
        found: dict[str, None] = {}
        census = census_of(self.source)
        for rank, held in sources.items():
            there = held.tile_digests(slots[rank])
            here = census.tile_digests(rank, held.storages(slots[rank]))
            tiles = self.source.ranks[rank].tiles
            for tile, one, other in zip(tiles, there, here, strict=True):
                if one != other:
                    found[f"{tile.parameter} changed on source rank {rank}"] = None
        for copy in self.copies:
            held = sources[copy.source_rank].storages(slots[copy.source_rank])
            if not _arrived(copy, held, into):
                found[f"{copy.target_storage} arrived wrong"] = None
        return list(found)

    def _read_once(
        self, publication: Publication, sources: Mapping[int, Slots], into: Mapping[str, Tensor]
    ) -> tuple[int, ...]:
        slots = {rank: find_slot(held, publication) for rank, held in sources.items()}
        before = {rank: held.header(slots[rank]) for rank, held in sources.items()}
        views = {rank: held.storages(slots[rank]) for rank, held in sources.items()}
        run_moves(self._moves, views, {self._rank: into})
        run_moves(self._shares, {self._rank: into}, {self._rank: into})
        for tensor in into.values():
            if tensor.is_cuda:  # the copies are queued; the source must not be let go before them
                torch.cuda.synchronize(tensor.device)
                break
        if before != {rank: held.header(slots[rank]) for rank, held in sources.items()}:
            raise StaleWeightsError(
                f"version {publication.version} was overwritten while it was read; pull the newest"
            )
        return self.shares(into)


@lru_cache(maxsize=2)
def _proven_plan(source: Layout, target: Layout) -> TransferPlan:
    """Return the plan for all target ranks; those that one process holds share it."""
    plan = plan_transfer(source, target)
    if problems := verify_transfer(plan, source, target):
        raise LayoutError("the planned transfer is wrong:\n" + "\n".join(problems))
    return plan


def find_slot(held: Slots, publication: Publication) -> int:
    """Return the slot that holds the published version.

    Raises:
        StaleWeightsError: none does.
    """
    headers = [held.header(slot) for slot in range(held.num_slots)]
    for slot, header in enumerate(headers):
        if header.version == publication.version and (
            header.layout_id == publication.source_layout_id
        ):
            return slot
    raise StaleWeightsError(
        f"version {publication.version} is asked for, the arena holds versions "
        f"{sorted(header.version for header in headers)}; pull the newest publication"
    )


def _arrived(copy: Copy, source: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> bool:
    """Return whether a copy left the same bytes at its target; NaN is a value like any other."""
    region = into[copy.target_storage][copy.target_box.slices].contiguous().view(torch.uint8)
    wanted = source[copy.source_storage][copy.source_box.slices].contiguous().view(torch.uint8)
    return torch.equal(region.flatten(), wanted.to(region.device).flatten())


def listed(names: Sequence[str]) -> str:
    """Return what ``faults`` found as a phrase that is not too long."""
    if not names:
        return "every tensor is now as it is at the source: it changed in between"
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return "wrong: " + "; ".join(names[:_NAMES_SHOWN]) + more
