"""Spread bytes evenly over those who can serve them. Exact integers: the same on every machine.

Pieces that the same ranks can serve form a class. How many bytes of each class each rank should
serve is found first, as if pieces could be cut anywhere; then the pieces of a class are laid end to
end and the line is cut into such shares. Neighbouring pieces thus stay with one rank, and a rank is
off its share by little more than a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from npr_megatron.weights.plans.tile_table import Ints

Holders = tuple[int, ...]

_MAX_SWEEPS = 200
_SETTLED_FRAC = 1e-5
"""Shares are final once none moves by more than this part of the mean load."""
_WHOLE_FRAC = 1 / 256
"""A cut moves by up to this part of the mean load if it then falls between two pieces."""


@dataclass(frozen=True, slots=True)
class Dealt:
    """Parts of pieces and who serves each: rows ``[first, last)`` of ``piece`` by ``rank``."""

    piece: Ints
    first: Ints
    last: Ints
    rank: Ints


def even_shares(totals: Sequence[int], holders: Sequence[Holders]) -> list[list[int]]:
    """Return how much of each total each of its holders serves, so that loads are most even.

    Each class in turn fills up its least loaded holders while the others stand still. That descends
    the sum of squared loads, whose minimum is also the least possible maximum.
    """
    loads = {rank: 0 for ranks in holders for rank in ranks}
    shares = [[0] * len(ranks) for ranks in holders]
    order = sorted(range(len(totals)), key=lambda index: (len(holders[index]), -totals[index]))
    settled = int(sum(totals) / max(1, len(loads)) * _SETTLED_FRAC)
    for _ in range(_MAX_SWEEPS):
        moved = 0
        for index in order:
            ranks = holders[index]
            others = [loads[rank] - share for rank, share in zip(ranks, shares[index], strict=True)]
            filled = _fill_up(others, totals[index])
            moved = max(moved, *(abs(a - b) for a, b in zip(filled, shares[index], strict=True)))
            shares[index] = filled
            loads.update({rank: a + b for rank, a, b in zip(ranks, others, filled, strict=True)})
        if moved <= settled:
            break
    return shares


def _fill_up(loads: Sequence[int], total: int) -> list[int]:
    """Return what each load gets when ``total`` is poured over them like water."""
    order = sorted(range(len(loads)), key=lambda index: loads[index])
    below, wet = 0, 0  # sum and number of the loads under water
    for index in order:
        if wet and loads[index] * wet - below >= total:
            break
        below += loads[index]
        wet += 1
    level, spare = divmod(below + total, wet)
    filled = [0] * len(loads)
    for number, index in enumerate(order[:wet]):
        filled[index] = level - loads[index] + (number < spare)
    return filled


def deal(piece_class: Ints, holders: Sequence[Holders], num_rows: Ints, num_bytes: Ints) -> Dealt:
    """Give every row of every piece to one of the holders of its class.

    Args:
        piece_class: [n] index into ``holders``; pieces of a class that should stay together are
            neighbours.
        num_rows: [n] rows of each piece; all rows of a piece have the same size.
        num_bytes: [n]
    """
    line = np.argsort(piece_class, kind="stable")
    classes, rows = piece_class[line], num_rows[line]
    num_classes = len(holders)
    totals = np.zeros(num_classes, np.int64)
    np.add.at(totals, classes, num_bytes[line])
    shares = even_shares([int(total) for total in totals], holders)
    num_ranks = len({rank for ranks in holders for rank in ranks})
    whole = int(num_bytes.sum()) / max(1, num_ranks) * _WHOLE_FRAC
    cuts = _cuts(shares, rows, num_bytes[line], whole)
    begins = rows.cumsum() - rows
    both = np.sort(np.concatenate([begins, cuts[cuts < rows.sum()]]), kind="stable")
    parts = both[np.append(True, np.diff(both) != 0)[: len(both)]]
    piece = np.searchsorted(begins, parts, side="right") - 1
    sizes = np.fromiter(map(len, holders), np.int64, num_classes)
    firsts = sizes.cumsum() - sizes  # of the holders of each class, all in one row
    cuts_before = firsts - np.arange(num_classes)
    turn = np.searchsorted(cuts, parts, side="right") - cuts_before[classes[piece]]
    ranks = np.fromiter((rank for one in holders for rank in one), np.int64, int(sizes.sum()))
    return Dealt(
        piece=line[piece],
        first=parts - begins[piece],
        last=np.append(parts[1:], rows.sum()) - begins[piece],
        rank=ranks[firsts[classes[piece]] + turn],
    )


def _cuts(shares: Sequence[Sequence[int]], rows: Ints, sizes: Ints, whole: float) -> Ints:
    """Return the rows, counted along the line of all classes, where another holder begins."""
    ends = sizes.cumsum()
    row_begins = rows.cumsum() - rows
    at: list[int] = []
    served = 0
    for class_shares in shares:
        for share in class_shares[:-1]:
            served += share
            at.append(served)
        served += class_shares[-1]
    where = np.array(at, np.int64)
    if not len(rows):
        return where
    piece = np.minimum(np.searchsorted(ends, where, side="right"), len(rows) - 1)
    inside = where - (ends[piece] - sizes[piece])
    after = sizes[piece] - inside
    row = (inside * rows[piece] + sizes[piece] // 2) // sizes[piece]
    row[inside <= np.minimum(after, whole)] = 0
    row = np.where(after <= np.minimum(inside - 1, whole), rows[piece], row)
    return row_begins[piece] + row
