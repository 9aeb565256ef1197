"""Proof that a plan is right, from the declarations alone.

Independent of the planner: no shared geometry, no notion of replicas or balance. It asks of every
copy which canonical elements its bytes are at the source and which they must be at the target, and
of every target storage whether its elements are written exactly once; and it counts for itself how
much must cross the wire at least. Interval arithmetic only, so a plan for a large model is checked
without a tensor or a loop over elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from npr_megatron.weights.plans.copy_table import CopyTable
from npr_megatron.weights.plans.plan import TransferPlan
from npr_megatron.weights.proof.declared import PINNED, Declared, declare
from npr_megatron.weights.proof.intervals import Numbers, Spans, common, covered, overlaps, sums
from npr_megatron.weights.proof.wire_minimum import fewest_elements, nodes_of
from npr_megatron.weights.tiles import Layout

_MAX_NAMED = 20
"""Problems of one kind that are spelled out."""


def verify_transfer(plan: TransferPlan, source: Layout, target: Layout) -> list[str]:
    """Return what is wrong with ``plan``, one sentence each; empty means proven correct.

    Proven are: every target element under a tile is written exactly once, no other element is
    written; every element comes from a tile that holds that same canonical element, in a storage of
    the same dtype; shares stay on a node and read only what copies wrote; what crosses the wire is
    the least there can be.
    """
    if problems := _of_other_layouts(plan, source, target):
        return problems
    there, here = declare(source, target)
    copies = _Moves("copy", plan.copy_table, there, here)
    shares = _Moves("share", plan.share_table, here, here)
    if problems := [*copies.misplaced(), *shares.misplaced()]:
        return problems  # what follows takes every move to be inside its storages
    problems += _named(f"source {doubt}" for doubt in there.doubly_declared())
    problems += _named(f"target {doubt}" for doubt in here.doubly_declared())
    problems += [*copies.wrong_elements(), *shares.wrong_elements()]
    problems += _not_written_once(here, copies, shares)
    problems += shares.sentences(
        covered(shares.reads, copies.writes) != shares.reads.volume,
        "reads what no copy has written",
    )
    nodes = nodes_of(plan.target_nodes, len(target.ranks))
    problems += shares.sentences(
        nodes[plan.share_table.source_rank] != nodes[plan.share_table.target_rank],
        "goes from one node to another",
    )
    fewest = fewest_elements(there, here, nodes, plan.source_nodes)
    return problems + _not_fewest(plan, nodes, fewest.sum(axis=0))


def _of_other_layouts(plan: TransferPlan, source: Layout, target: Layout) -> list[str]:
    problems: list[str] = []
    for side, plan_id, nodes, layout in (
        ("source", plan.source_id, plan.source_nodes, source),
        ("target", plan.target_id, plan.target_nodes, target),
    ):
        if plan_id != layout.layout_id:
            problems.append(f"the plan is for {side} layout {plan_id}, not {layout.layout_id}")
        if nodes is not None and len(nodes) != len(layout.ranks):
            problems.append(f"{len(nodes)} nodes are given for {len(layout.ranks)} {side} ranks")
    return problems


class _Moves:
    """Copies or shares, with what they read and write."""

    def __init__(self, kind: str, table: CopyTable, there: Declared, here: Declared) -> None:
        self.kind, self.table, self.there, self.here = kind, table, there, here
        num_axes = here.shape.shape[1]
        shape = _widened(table.shape, num_axes, 1)
        ends: list[Spans] = []
        for side, rank, storage, names, start in (
            (
                there,
                table.source_rank,
                table.source_storage,
                table.source_names,
                table.source_start,
            ),
            (here, table.target_rank, table.target_storage, table.target_names, table.target_start),
        ):
            low = _widened(start, num_axes, 0)
            ends.append(Spans(_places(side, rank, storage, names), low, low + shape))
        self.reads, self.writes = ends

    def misplaced(self) -> list[str]:
        """Return which moves leave their storages or change dtype."""
        table, problems = self.table, list[str]()
        for name, side, spans, num_axes in (
            ("source", self.there, self.reads, table.source_axes),
            ("target", self.here, self.writes, table.target_axes),
        ):
            place = np.maximum(spans.group, 0)
            inside = (spans.group >= 0) & (num_axes == side.num_axes[place])
            inside &= (spans.low >= 0).all(axis=1) & (spans.high > spans.low).all(axis=1)
            inside &= (spans.high <= side.shape[place]).all(axis=1) & (table.num_axes <= num_axes)
            problems += self.sentences(~inside, f"leaves {name} storages or names none")
            problems += self.sentences(
                inside & (side.dtype[place] != table.dtype),
                f"is not of the dtype of its {name} storage",
            )
        return problems

    def wrong_elements(self) -> list[str]:
        """Return which moves bring other canonical elements than belong where they write.

        Both ends are compared in offsets from the beginning of the move: what a target tile wants
        there must be what source tiles of the same parameter have, at the same distance from its
        canonical coordinates.
        """
        want, have = _contents(self.writes, self.here), _contents(self.reads, self.there)
        one, other, parts = common(want.offsets, have.offsets)
        same = want.parameter[one] == have.parameter[other]
        same &= (want.to_canonical[one] == have.to_canonical[other]).all(axis=1)
        right = sums(parts.volume[same], parts.group[same], len(self.table))
        return self.sentences(
            right != self.writes.volume, "brings elements that do not belong where it writes"
        )

    def sentences(self, wrong: npt.NDArray[np.bool_], what: str) -> list[str]:
        """Return one sentence for each wrong move."""
        rows = np.flatnonzero(wrong)
        return _named(
            f"{self.kind} {copy} {what}"
            for start in range(0, len(rows), _MAX_NAMED)
            for copy in self.table.take(rows[start : start + _MAX_NAMED]).copies()
        )


@dataclass(frozen=True, slots=True)
class _Contents:
    """Parts of moves that lie in one tile each."""

    offsets: Spans
    """By move, from its beginning."""
    parameter: Numbers
    to_canonical: Numbers
    """From offsets."""


def _contents(ends: Spans, side: Declared) -> _Contents:
    move, tile, parts = common(ends, side.spans)
    begin = ends.low[move]
    offsets = Spans(move, parts.low - begin, parts.high - begin)
    return _Contents(offsets, side.parameter[tile], side.to_canonical[tile] + begin)


def _not_written_once(here: Declared, copies: _Moves, shares: _Moves) -> list[str]:
    writes = Spans(
        np.concatenate([copies.writes.group, shares.writes.group]),
        np.concatenate([copies.writes.low, shares.writes.low]),
        np.concatenate([copies.writes.high, shares.writes.high]),
    )

    def place(index: int) -> tuple[int, str]:
        return here.place_names[int(writes.group[index])]

    problems = _named(
        f"target storage {place(one)}: moves {one} and {other} write the same elements"
        for one, other in overlaps(writes)
    )
    written, wanted = covered(here.spans, writes), here.spans.volume
    problems += _named(
        f"target rank {here.rank[tile]}: {written[tile]} of {wanted[tile]} elements of "
        f"{here.tiles[tile]} are written"
        for tile in np.flatnonzero(written != wanted).tolist()
    )
    return problems + _named(
        f"target storage {place(move)}: move {move} writes padding"
        for move in np.flatnonzero(covered(writes, here.spans) != writes.volume).tolist()
    )


def _not_fewest(plan: TransferPlan, target_nodes: Numbers, fewest: Numbers) -> list[str]:
    table = plan.copy_table
    crosses = np.ones(len(table), np.bool_)
    if plan.source_nodes is not None:
        source_nodes = np.array(plan.source_nodes, np.int64)
        crosses = source_nodes[table.source_rank] != target_nodes[table.target_rank]
    moved = sums(table.num_elements[crosses], table.dtype[crosses], len(PINNED))
    return [
        f"{moved[number]} elements of {dtype or 'the weights'} dtype cross the wire, expected "
        f"{fewest[number]}"
        for number, dtype in enumerate(PINNED)
        if moved[number] != fewest[number]
    ]


def _places(side: Declared, rank: Numbers, storage: Numbers, names: Sequence[str]) -> Numbers:
    """Return the place that each move names, -1 for none."""
    pairs, pair = np.unique(rank * (1 + len(names)) + storage, return_inverse=True)
    found = [
        side.places.get((int(one) // (1 + len(names)), names[int(one) % (1 + len(names))]), -1)
        for one in pairs
    ]
    return np.array(found, np.int64)[pair] if len(pairs) else pair.astype(np.int64)


def _widened(rows: Numbers, num_axes: int, fill: int) -> Numbers:
    """Return rows with more leading axes, or without those that say nothing."""
    missing = num_axes - rows.shape[1]
    if missing <= 0:
        return rows[:, -missing:]
    return np.hstack([np.full((len(rows), missing), fill, np.int64), rows])


def _named(sentences: Iterable[str]) -> list[str]:
    iterator = iter(sentences)
    first = list(islice(iterator, _MAX_NAMED))
    num_more = sum(1 for _ in iterator)
    return [*first, f"and {num_more} more like this"] if num_more else first
