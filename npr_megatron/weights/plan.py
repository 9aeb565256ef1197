"""From two layouts to the copies that turn one into the other. Pure and deterministic.

Every rank that plans the same two layouts gets the same plan with the same ``plan_id``, so plans
are never sent. Each target element is written by exactly one copy, therefore no byte moves twice.
Where replicas hold the same elements, the load is spread over them by size. Touches no tensor.
``verify`` proves a plan without using anything of this module's reasoning.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from npr_megatron.errors import LayoutError
from npr_megatron.weights.box import Box, Index
from npr_megatron.weights.copies import Copy
from npr_megatron.weights.tiles import Layout, Tile

_SPLIT_FRAC = 1 / 8
"""A load above this share of a source rank's fair load is cut over all replicas of it."""


@dataclass(frozen=True)
class TransferPlan:
    """All copies between two layouts, sorted by target."""

    source_id: str
    """``layout_id`` of the source."""
    target_id: str
    copies: tuple[Copy, ...]

    @cached_property
    def plan_id(self) -> str:
        """SHA-256 of the plan (64 hexadecimal digits)."""
        content = repr((self.source_id, self.target_id, self.copies))
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def num_elements(self) -> int:
        """Elements moved; times the element size, the bytes on the wire."""
        return sum(copy.source_box.num_elements for copy in self.copies)

    def copies_to(self, target_rank: int) -> tuple[Copy, ...]:
        """Return the copies that fill one target rank."""
        return tuple(copy for copy in self.copies if copy.target_rank == target_rank)


def plan_transfer(source: Layout, target: Layout) -> TransferPlan:
    """Return the copies that fill every tile of ``target`` from ``source``.

    Raises:
        LayoutError: a target element is nowhere in ``source``, or boxes of ``source`` overlap in
            part (replicas must be equal boxes).

    Example:
        tp 2 -> tp 1 of gate and up [8, 4] gives four copies of [4, 4].
    """
    pieces = _intersect(source, target)
    copies = _choose_sources(pieces, num_sources=len(source.ranks))
    return TransferPlan(source.layout_id, target.layout_id, tuple(_coalesce(copies)))


@dataclass(frozen=True, slots=True)
class _Holder:
    rank: int
    tile: Tile


@dataclass(frozen=True, slots=True)
class _Piece:
    """A canonical box that one target rank wants and several source ranks hold."""

    box: Box
    target_rank: int
    target_tile: Tile
    holders: tuple[_Holder, ...]

    def copy_from(self, holder: _Holder) -> Copy:
        there, here = holder.tile, self.target_tile
        return Copy(
            target_rank=self.target_rank,
            target_storage=here.storage,
            target_start=_in_storage(self.box, here),
            source_rank=holder.rank,
            source_storage=there.storage,
            source_start=_in_storage(self.box, there),
            shape=self.box.shape,
        )


def _in_storage(box: Box, tile: Tile) -> Index:
    """Return where a box inside ``tile`` begins in the tile's storage."""
    extra = len(tile.at) - len(box.start)
    return tile.at[:extra] + box.moved(tile.box.start, tile.at[extra:]).start


def _intersect(source: Layout, target: Layout) -> list[_Piece]:
    held = _holders(source)
    pieces: list[_Piece] = []
    for target_rank, rank_layout in enumerate(target.ranks):
        for tile in rank_layout.tiles:
            found = 0
            for box, holders in held.get(tile.parameter, {}).items():
                if (common := box.intersect(tile.box)) is not None:
                    pieces.append(_Piece(common, target_rank, tile, holders))
                    found += common.num_elements
            if found != tile.box.num_elements:
                raise LayoutError(
                    f"{target.kind} rank {target_rank} needs {tile.box.num_elements} elements of "
                    f"{tile.parameter} {tile.box}, the {source.kind} layout gives {found}; the "
                    "layouts are of different models or a declaration is wrong"
                )
    return pieces


def _holders(source: Layout) -> dict[str, dict[Box, tuple[_Holder, ...]]]:
    """Return who holds each distinct box of each parameter, lowest rank first."""
    held: defaultdict[str, defaultdict[Box, list[_Holder]]]
    held = defaultdict(lambda: defaultdict(list))
    for rank, rank_layout in enumerate(source.ranks):
        for tile in rank_layout.tiles:
            held[tile.parameter][tile.box].append(_Holder(rank, tile))
    for parameter, boxes in held.items():
        _require_disjoint(parameter, list(boxes))
    return {
        parameter: {box: tuple(holders) for box, holders in boxes.items()}
        for parameter, boxes in held.items()
    }


def _require_disjoint(parameter: str, boxes: Sequence[Box]) -> None:
    ordered = sorted(boxes)
    for index, box in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if other.start[0] >= box.stop[0]:
                break
            if box.intersect(other) is not None:
                raise LayoutError(
                    f"{parameter}: source boxes {box} and {other} overlap in part, replicas must "
                    "be equal boxes; cut both at the same places"
                )


def _choose_sources(pieces: Sequence[_Piece], num_sources: int) -> list[Copy]:
    """Give each bundle to its least loaded holder, what has no choice and what is large first.

    A bundle is what one target storage takes from the same holders: served by one source, its
    pieces are often neighbours on both sides and become one copy.
    """
    total = sum(piece.box.num_elements for piece in pieces)
    loads = [0] * num_sources
    copies: list[Copy] = []
    bundles = _bundles(pieces, limit=total / num_sources * _SPLIT_FRAC)
    sized = [(sum(piece.box.num_elements for piece in bundle), bundle) for bundle in bundles]
    sized.sort(key=lambda item: (len(item[1][0].holders) > 1, -item[0]))
    for size, bundle in sized:
        holders = bundle[0].holders
        chosen = min(range(len(holders)), key=lambda index: loads[holders[index].rank])
        loads[holders[chosen].rank] += size
        copies += [piece.copy_from(piece.holders[chosen]) for piece in bundle]
    return copies


def _bundles(pieces: Iterable[_Piece], limit: float) -> list[list[_Piece]]:
    together: defaultdict[tuple[object, ...], list[_Piece]] = defaultdict(list)
    for piece in pieces:
        ranks = tuple(holder.rank for holder in piece.holders)
        together[(piece.target_rank, piece.target_tile.storage, ranks)].append(piece)
    bundles: list[list[_Piece]] = []
    for bundle in together.values():
        size = sum(piece.box.num_elements for piece in bundle)
        if len(bundle[0].holders) > 1 and size > limit:
            bundles += [[part] for piece in bundle for part in _cut_rows(piece)]
        else:
            bundles.append(bundle)
    return bundles


def _cut_rows(piece: _Piece) -> list[_Piece]:
    """Cut a piece along its first axis into about equal parts, one for each holder."""
    first, last = piece.box.start[0], piece.box.stop[0]
    num_parts = min(len(piece.holders), last - first)
    cuts = [first + (last - first) * part // num_parts for part in range(num_parts + 1)]
    return [
        replace(piece, box=Box((low, *piece.box.start[1:]), (high, *piece.box.stop[1:])))
        for low, high in pairwise(cuts)
    ]


def _coalesce(copies: Iterable[Copy]) -> list[Copy]:
    """Join copies that continue each other downwards on both sides; return them sorted."""
    joined: list[Copy] = []
    for copy in sorted(copies):
        last = joined[-1] if joined else None
        if last is not None and copy == _continuation(last, copy.shape):
            height = last.shape[0] + copy.shape[0]
            joined[-1] = replace(last, shape=(height, *last.shape[1:]))
        else:
            joined.append(copy)
    return joined


def _continuation(copy: Copy, shape: Index) -> Copy | None:
    """Return the copy of ``shape`` right below ``copy``, None if widths differ."""
    if shape[1:] != copy.shape[1:]:
        return None
    return replace(
        copy,
        shape=shape,
        target_start=below(copy.target_start, copy.shape),
        source_start=below(copy.source_start, copy.shape),
    )


def below(start: Index, shape: Index, num_rows: int | None = None) -> Index:
    """Return the start of what lies ``num_rows`` (default: all) rows below a box's start."""
    axis = len(start) - len(shape)
    rows = shape[0] if num_rows is None else num_rows
    return (*start[:axis], start[axis] + rows, *start[axis + 1 :])
