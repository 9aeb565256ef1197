"""Any box of one layout, gathered from wherever another layout keeps its elements.

The copies of a transfer plan, carried out box by box instead of storage by storage: memory is what
the caller asks for at a time. Sources are files or the arenas of a living run.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Protocol

import torch
from torch import Tensor

from npr_megatron.errors import LayoutError
from npr_megatron.weights.box import Box, Index
from npr_megatron.weights.plans.plan import Copy, plan_transfer
from npr_megatron.weights.tiles import Layout, RankLayout, Tile


class Source(Protocol):
    """Weights that can be read box by box."""

    @property
    def layout(self) -> Layout:
        """Where their elements are."""
        ...

    def dtype_of(self, storage: str) -> torch.dtype:
        """Return the dtype of ``storage``."""
        ...

    def read(self, rank: int, storage: str, box: Box, into: Tensor) -> None:
        """Fill ``into``, shaped as ``box``, casting to its dtype."""
        ...


class Gather:
    """Boxes of the only rank of ``target``, read from ``source``."""

    def __init__(self, source: Source, target: Layout) -> None:
        """Plan the transfer.

        Raises:
            LayoutError: the layouts are not of the same model.
        """
        self._source = source
        self._copies: defaultdict[tuple[str, Index], list[Copy]] = defaultdict(list)
        self._dtypes: defaultdict[str, set[torch.dtype]] = defaultdict(set)
        for part in _without_replicas(target):
            for copy in plan_transfer(source.layout, part).copies:
                lead = copy.target_start[: len(copy.target_start) - len(copy.shape)]
                self._copies[(copy.target_storage, lead)].append(copy)
                self._dtypes[copy.target_storage].add(source.dtype_of(copy.source_storage))

    def dtype_of(self, storage: str) -> torch.dtype:
        """Return the dtype that the elements of target ``storage`` have at their source.

        Raises:
            LayoutError: they have several.
        """
        if len(self._dtypes[storage]) > 1:
            found = ", ".join(sorted(map(str, self._dtypes[storage])))
            raise LayoutError(
                f"{storage} is made of tensors of several dtypes ({found}); choose one with --dtype"
            )
        return next(iter(self._dtypes[storage]))

    def box(self, storage: str, box: Box, dtype: torch.dtype) -> Tensor:
        """Return ``storage[box]``; padding is zero. The box lies at one leading index."""
        found = torch.empty(box.shape, dtype=dtype)
        self.fill(storage, box, found)
        return found

    def fill(self, storage: str, box: Box, into: Tensor) -> None:
        """Write ``storage[box]`` into a tensor of its shape; padding becomes zero."""
        into.zero_()
        for lead in {box.start[:axes] for axes in range(len(box.start))}:
            for copy in self._copies.get((storage, lead), ()):
                if (common := copy.target_box.intersect(box)) is not None:
                    there = _at_source(copy, common)
                    here = common.moved(box.start, (0,) * len(box.start))
                    part = into[here.slices].view(there.shape)
                    self._source.read(copy.source_rank, copy.source_storage, there, part)


def _at_source(copy: Copy, box: Box) -> Box:
    """Return where the source keeps the part ``box`` of the target."""
    axes = len(copy.shape)
    lead = len(copy.source_start) - axes
    inner = Box(box.start[-axes:], box.stop[-axes:])
    inner = inner.moved(copy.target_start[-axes:], copy.source_start[lead:])
    first = copy.source_start[:lead]
    return Box(first + inner.start, tuple(a + 1 for a in first) + inner.stop)


def _without_replicas(layout: Layout) -> list[Layout]:
    """Return layouts that have the tiles of ``layout`` between them, each box at most once.

    A plan would have the target copy within itself what it wants twice; here there is no target.
    """
    parts: list[dict[tuple[str, Box], Tile]] = []
    (rank_layout,) = layout.ranks
    for tile in rank_layout.tiles:
        key = (tile.parameter, tile.box)
        free = next((part for part in parts if key not in part), None)
        if free is None:
            free = {}
            parts.append(free)
        free[key] = tile
    return [
        Layout(layout.kind, (RankLayout(rank_layout.storages, tuple(part.values())),))
        for part in parts
    ]
