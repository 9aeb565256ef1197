"""Which decoding rows read the same slots first, and where reading those once for all pays.

Rollouts of one prompt borrow the prompt's slots, branches those of their trunk, and prompts may
borrow from each other. These beginnings are nested: the branches of all rollouts of a prompt share
the prompt, those of one rollout more. Each row can take part in one family only, so the choice is
made from the longest beginnings outwards, keeping what saves more reads. Pure; decides speed, not
results.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from npr_megatron.engine.compiled import compiled
from npr_megatron.engine.memory.pool import NO_PARENT, SlotPool

IndexArray = npt.NDArray[np.int64]

MIN_SAVED_READS = 4096
"""Slots a step must read less for a family to pay for its kernels, against rows that read their
slots in place. Measured on a CPU with 128 floats per slot: 0.9 times as fast at 3,800 (16 rollouts
of a prompt of 256), 1.15 times at 7,700 (of 512), 2.2 times at 30,000 (of 2,048).
"""


class Families(NamedTuple):
    """A partition of rows."""

    labels: IndexArray
    """[B] number of each row's family; 0 for rows that share nothing worth it."""
    num_shared: list[int]
    """Slots that all rows of a family read first; 0 for family 0."""


class _Beginning(NamedTuple):
    length: int
    members: npt.NDArray[np.bool_]
    num_saved: int


def find_families(rows: IndexArray, pool: SlotPool) -> Families:
    """Return the families among distinct open ``rows`` that save the most reads."""
    labels, num_shared = np.zeros(len(rows), dtype=np.int64), [0]
    if len(rows) < 2 or not _may_save(rows, pool.own_start, pool.parent):
        return Families(labels, num_shared)
    saved_by_row = np.zeros(len(rows))
    for length, members, num_saved in _beginnings(rows, pool):
        if num_saved < saved_by_row[members].sum() + MIN_SAVED_READS:
            continue
        labels[members] = len(num_shared)
        num_shared.append(length)
        saved_by_row[members] = num_saved / members.sum()
    return Families(labels, num_shared)


@compiled
def _may_save(rows: IndexArray, own_start: IndexArray, parent: IndexArray) -> bool:
    """Return False where no beginning can save enough: each row has a prompt of its own, and the
    prompts are alike in their first words only.
    """
    least = MIN_SAVED_READS / (len(rows) - 1)
    for index in range(len(rows)):
        lender = parent[rows[index]]
        if lender == NO_PARENT or own_start[rows[index]] < least:
            continue
        if own_start[lender] >= least:
            return True
        for other in range(index):
            if parent[rows[other]] == lender:
                return True
    return False


def _beginnings(rows: IndexArray, pool: SlotPool) -> list[_Beginning]:
    """Return the shared beginnings that would save enough on their own, inner ones first."""
    places: list[IndexArray] = []
    lent, lender = pool.own_start[rows], pool.parent[rows]
    # A row further up lends less, so the search ends where even all rows together save too little.
    while (len(rows) - 1) * int(lent.max()) >= MIN_SAVED_READS:
        if len(set(lender.tolist())) < len(rows):  # else nobody shares, which is soon seen
            places.append((lender << 32) + lent)
        has_lender = lender != NO_PARENT
        lent = np.where(has_lender, np.minimum(lent, pool.own_start[lender]), 0)
        lender = np.where(has_lender, pool.parent[lender], NO_PARENT)
    if not places:
        return []
    found: list[_Beginning] = []
    levels = np.stack(places)
    for place, count in zip(*np.unique(levels, return_counts=True), strict=True):
        length = int(place & 0xFFFFFFFF)
        num_saved = (int(count) - 1) * length
        if place >= 0 and num_saved >= MIN_SAVED_READS:
            found.append(_Beginning(length, (levels == place).any(axis=0), num_saved))
    found.sort(key=lambda beginning: (-beginning.length, beginning.num_saved))
    return found
