"""Who gives what to whom: from canonical boxes that meet to copies over the wire and shares.

A piece is a canonical box that lies in one box of the source and in one box of the target and is
wanted on one node. It is received by one of those who want it there and given by one of those who
hold it; both are chosen by bytes, and pieces are cut by rows where that makes loads even.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from npr_megatron.weights.plans.balance import Dealt, deal
from npr_megatron.weights.plans.copies import element_bytes
from npr_megatron.weights.plans.copy_table import CopyTable
from npr_megatron.weights.plans.intersect import along_rows, distinct_boxes, meeting, row_numbers
from npr_megatron.weights.plans.rank_sets import RankSets
from npr_megatron.weights.plans.requirements import (
    require_covered,
    require_disjoint,
    require_dtypes,
)
from npr_megatron.weights.plans.tile_table import PINNED_DTYPES, Ints, TileTable, tile_tables
from npr_megatron.weights.tiles import Layout


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces by column, with the tiles of both sides that they lie in."""

    have: TileTable
    """Of the source."""
    want: TileTable
    """Of the target."""
    holders: RankSets
    """Source ranks that hold each distinct box of the source; rows are tiles of ``have``."""
    wishers: RankSets
    """Target ranks of one node that want a distinct box of the target; rows are of ``want``."""
    wish_of_tile: Ints
    """Group of ``wishers`` that each tile of ``want`` belongs to."""
    node: Ints
    """Node of each target rank."""
    held: Ints
    """[n] group of ``holders``"""
    wish: Ints
    """[n] group of ``wishers``"""
    start: Ints
    """[n, axes] canonical"""
    stop: Ints
    num_axes: Ints
    element_bytes: Ints

    @property
    def num_rows(self) -> Ints:
        """Extent along the first axis."""
        return along_rows(self.stop - self.start, self.num_axes)

    @property
    def num_bytes(self) -> Ints:
        """Size of each piece."""
        return (self.stop - self.start).prod(axis=1) * self.element_bytes

    def take(self, rows: Ints) -> Pieces:
        """Return some pieces, in the order asked for."""
        columns = ("held", "wish", "start", "stop", "num_axes", "element_bytes")
        return replace(self, **{name: getattr(self, name)[rows] for name in columns})

    def cut(self, dealt: Dealt) -> Pieces:
        """Return the parts of pieces that were dealt."""
        parts = self.take(dealt.piece)
        first = parts.start.shape[1] - parts.num_axes
        every = np.arange(len(first))
        start, stop = parts.start.copy(), parts.stop.copy()
        stop[every, first] = start[every, first] + dealt.last
        start[every, first] += dealt.first
        return replace(parts, start=start, stop=stop)


def find_pieces(
    source: Layout, target: Layout, target_nodes: Sequence[int] | None, weight_bytes: int
) -> Pieces:
    """Return all pieces, in the order in which the target declares its tiles.

    Raises:
        LayoutError: see ``plan_transfer``.
    """
    have, want, parameters = tile_tables(source, target)
    require_dtypes(source.kind, have, target.kind, want, parameters)
    held, held_of_tile = distinct_boxes(have)
    wanted, wanted_of_tile = distinct_boxes(want)
    require_disjoint(source.kind, held, parameters)
    require_disjoint(target.kind, wanted, parameters)
    one, other = meeting(held, wanted)
    start = np.maximum(held.start[one], wanted.start[other])
    stop = np.minimum(held.stop[one], wanted.stop[other])
    found = np.zeros(len(wanted), np.int64)
    np.add.at(found, other, (stop - start).prod(axis=1))
    require_covered(source.kind, target.kind, want, wanted_of_tile, found, parameters)
    nodes = np.arange(len(target.ranks)) if target_nodes is None else np.array(target_nodes)
    first_tile, wish_of_tile = row_numbers([wanted_of_tile, nodes[want.rank]])
    pair, wish = _for_each_node(other, wanted_of_tile[first_tile])
    sizes = np.array([element_bytes(dtype, weight_bytes) for dtype in PINNED_DTYPES])
    pieces = Pieces(
        have=have,
        want=want,
        holders=RankSets(held_of_tile, have.rank, len(held)),
        wishers=RankSets(wish_of_tile, want.rank, len(first_tile)),
        wish_of_tile=wish_of_tile,
        node=nodes,
        held=one[pair],
        wish=wish,
        start=start[pair],
        stop=stop[pair],
        num_axes=held.num_axes[one[pair]],
        element_bytes=sizes[want.dtype[first_tile[wish]]],
    )
    return pieces.take(_in_order(pieces, first_tile[wish]))


def assign(pieces: Pieces, source_nodes: Sequence[int] | None) -> tuple[CopyTable, CopyTable]:
    """Return the copies from source ranks and the shares among target ranks."""
    wishers, holders, want, have = pieces.wishers, pieces.holders, pieces.want, pieces.have
    received = deal(wishers.number[pieces.wish], wishers.sets, pieces.num_rows, pieces.num_bytes)
    parts = pieces.cut(received)
    tile = wishers.row_of(parts.wish, received.rank)
    shares = _shares(parts, tile)
    order = _in_order(parts, tile)
    parts, tile = parts.take(order), tile[order]
    given = _deal_sources(parts, parts.node[want.rank[tile]], source_nodes)
    parts, tile = parts.cut(given), tile[given.piece]
    source_tile = holders.row_of(parts.held, given.rank)
    return _copies(parts, have, source_tile, want, tile), shares


def _for_each_node(box_of_pair: Ints, box_of_wish: Ints) -> tuple[Ints, Ints]:
    """Combine each pair with every wish for its target box; both are sorted by box."""
    first = np.searchsorted(box_of_wish, box_of_pair, side="left")
    counts = np.searchsorted(box_of_wish, box_of_pair, side="right") - first
    pair = np.repeat(np.arange(len(box_of_pair)), counts)
    wish = np.arange(len(pair)) + np.repeat(first - (counts.cumsum() - counts), counts)
    return pair, wish


def _in_order(pieces: Pieces, tile: Ints) -> Ints:
    """Return the order of the target's tiles, then of coordinates."""
    return np.lexsort((*pieces.start.T[::-1], tile))


def _shares(parts: Pieces, received: Ints) -> CopyTable:
    """Return what goes on from the tile in which each part was received to others of the wish."""
    tiles = np.argsort(parts.wish_of_tile, kind="stable")
    part, position = _for_each_node(parts.wish, parts.wish_of_tile[tiles])
    further = tiles[position] != received[part]
    part, tile = part[further], tiles[position][further]
    return _copies(parts.take(part), parts.want, received[part], parts.want, tile)


def _deal_sources(parts: Pieces, node: Ints, source_nodes: Sequence[int] | None) -> Dealt:
    """Choose who gives each part: one on the same node if there is any, else any holder."""
    classes = parts.holders.number[parts.held]
    if source_nodes is None:
        return deal(classes, parts.holders.sets, parts.num_rows, parts.num_bytes)
    first, where = row_numbers([classes, node])
    sets: list[tuple[int, ...]] = []
    at_home = np.zeros(len(first), np.bool_)
    for index, row in enumerate(first):
        everyone = parts.holders.sets[classes[row]]
        near = tuple(rank for rank in everyone if source_nodes[rank] == node[row])
        at_home[index] = bool(near)
        sets.append(near or everyone)
    dealt = [
        _deal_some(parts, where, sets, np.flatnonzero(at_home[where] == local))
        for local in (False, True)
    ]
    return Dealt(
        *(
            np.concatenate([getattr(one, name) for one in dealt])
            for name in ("piece", "first", "last", "rank")
        )
    )


def _deal_some(parts: Pieces, where: Ints, sets: Sequence[tuple[int, ...]], rows: Ints) -> Dealt:
    """Deal some parts only: what stays on a node does not load the wire."""
    some = parts.take(rows)
    dealt = deal(where[rows], sets, some.num_rows, some.num_bytes)
    return replace(dealt, piece=rows[dealt.piece])


def _copies(
    parts: Pieces, have: TileTable, source_tile: Ints, want: TileTable, target_tile: Ints
) -> CopyTable:
    return CopyTable(
        target_names=want.storage_names,
        source_names=have.storage_names,
        target_rank=want.rank[target_tile],
        target_storage=want.storage[target_tile],
        target_axes=want.storage_axes[target_tile],
        target_start=parts.start + want.shift[target_tile],
        source_rank=have.rank[source_tile],
        source_storage=have.storage[source_tile],
        source_axes=have.storage_axes[source_tile],
        source_start=parts.start + have.shift[source_tile],
        shape=parts.stop - parts.start,
        num_axes=parts.num_axes,
        dtype=want.dtype[target_tile],
    ).joined()
