"""Which KV slot holds which token of which row. Integers only; the tensors live in
``engine.compute``.

A *row* is an ordered list of slots: the keys one stream of tokens may read. Rows form a tree. A row
opened on a parent borrows a beginning of the parent's slots as its prefix and owns only what it
appends: rollouts borrow from their prompt, branches borrow from their trunk, prompts from what they
begin alike. Fork and join therefore move no key or value:

    fork   a branch row starts as an alias of the trunk's slots
    join   the trunk row takes over the slots its branches own, in branch order
    split  a row's own slots are dealt to two rows, so that others may borrow the first of them

Invariants (``check_integrity``): every slot is free or owned by exactly one row, so nothing can be
freed twice; a borrowed prefix equals the beginning of its parent; a row that lends is never closed.
Slot 0 is a dummy that pads index tables and is never handed out.

This module knows nothing of budgets or requests; ``engine.schedule`` reserves, so ``append`` cannot
run dry.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from npr_megatron.engine.compiled import compiled
from npr_megatron.errors import EnvironmentFault

SlotArray = npt.NDArray[np.int32]
RowArray = npt.NDArray[np.int64]

NO_PARENT = -1


class SlotPool:
    """The slots of one KV cache and the rows that own them.

    ``table[row, :length[row]]`` lists the slots row ``row`` reads, oldest first, and entries beyond
    are slot 0, so that padding never reads what another row wrote. The first ``own_start[row]`` of
    them are borrowed from ``parent[row]`` (``NO_PARENT`` if there are none), the others are its
    own. These arrays are for reading only, and by this name: they are replaced as rows are added.
    Memory is touched where rows hold tokens, not where they may come to hold some.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = np.arange(num_slots, 0, -1, dtype=np.int32)
        self._num_free = num_slots
        self._free_rows: list[int] = []
        self.table: SlotArray = np.zeros((0, 64), dtype=np.int32)
        self.length: RowArray = np.zeros(0, dtype=np.int64)
        self.own_start: RowArray = np.zeros(0, dtype=np.int64)
        self.parent: RowArray = np.zeros(0, dtype=np.int64)
        self._num_borrowers: RowArray = np.zeros(0, dtype=np.int64)
        self._is_open: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)

    @property
    def num_free(self) -> int:
        """Slots nobody owns."""
        return self._num_free

    @property
    def num_rows(self) -> int:
        """Rows open now."""
        return len(self.length) - len(self._free_rows)

    def open_row(self, parent: int | None, capacity: int, length: int | None = None) -> int:
        """Open a row that reads what ``parent`` reads now and owns nothing yet.

        Args:
            parent: an open row to borrow from, or None for an empty beginning. One that lends no
                slot is not kept open by it.
            capacity: tokens the row will ever hold, borrowed ones included.
            length: borrow only so many of the parent's first slots.
        """
        self._make_room(capacity)
        num_lent = 0 if parent is None else int(self.length[parent])
        num_borrowed = num_lent if length is None else length
        if num_borrowed > num_lent:
            raise AssertionError(
                f"row {parent} of {num_lent} tokens was asked to lend {num_borrowed}"
            )
        row = self._free_rows.pop()
        self._is_open[row] = True
        self.length[row] = self.own_start[row] = num_borrowed
        self.parent[row] = NO_PARENT
        self._num_borrowers[row] = 0
        if parent is not None and num_borrowed:
            self.table[row, :num_borrowed] = self.table[parent, :num_borrowed]
            self.parent[row] = parent
            self._num_borrowers[parent] += 1
        return row

    def split(self, row: int, length: int) -> int:
        """Open a row that takes over what ``row`` owns of its first ``length`` slots, and lends
        them to it; ``row`` reads what it read.
        """
        if not self.own_start[row] < length < self.length[row]:
            raise AssertionError(
                f"row {row} owns slots {self.own_start[row]} to {self.length[row]} and was to be "
                f"split at {length}"
            )
        upper = self.open_row(row, length, length)
        # In the order above, below: the parent's borrower is now ``upper``, and that of ``row``
        # has become its parent.
        self.own_start[upper], self.own_start[row] = self.own_start[row], length
        self.parent[upper], self.parent[row] = self.parent[row], upper
        self._num_borrowers[row] -= 1
        self._num_borrowers[upper] = 1
        return upper

    def append(self, row: int, num_tokens: int) -> SlotArray:
        """Give ``row`` ownership of ``num_tokens`` new slots and return them."""
        slots = self._take(num_tokens)
        start = self.length[row]
        self.table[row, start : start + num_tokens] = slots
        self.length[row] = start + num_tokens
        return slots

    def append_one_each(self, rows: RowArray) -> SlotArray:
        """Append one slot to each of several distinct rows: the decode step, vectorised."""
        slots = self._take(len(rows))
        _append(self.table, self.length, rows, slots)
        return slots

    def read_each(self, rows: RowArray) -> npt.NDArray[np.int64]:
        """Return [B, L] the slots several rows read, padded with slot 0."""
        slots = np.zeros((len(rows), int(self.length[rows].max())), np.int64)
        _read(self.table, self.length, rows, slots)
        return slots

    def read(self, row: int) -> SlotArray:
        """Return a copy of the slots ``row`` reads."""
        return self.table[row, : self.length[row]].copy()

    def read_own(self, row: int) -> SlotArray:
        """Return a copy of the slots ``row`` owns."""
        return self.table[row, self.own_start[row] : self.length[row]].copy()

    def absorb(self, row: int, branch_rows: Sequence[int]) -> None:
        """Join: move what ``branch_rows`` own to the end of ``row``, in order, and close them."""
        for branch_row in branch_rows:
            own = self.table[branch_row, self.own_start[branch_row] : self.length[branch_row]]
            start = self.length[row]
            self.table[row, start : start + len(own)] = own
            self.length[row] = start + len(own)
            self.own_start[branch_row] = self.length[branch_row]
            self.close(branch_row)

    def close(self, row: int) -> None:
        """Free the slots ``row`` owns and forget it. No row may borrow from it any more."""
        if not self._is_open[row]:
            raise AssertionError(f"row {row} is closed, but it is not open")
        if self._num_borrowers[row]:
            raise AssertionError(f"row {row} is closed while {self._num_borrowers[row]} borrow it")
        length = self.length[row]
        own = self.table[row, self.own_start[row] : length]
        self._free[self._num_free : self._num_free + len(own)] = own
        self._num_free += len(own)
        self.table[row, :length] = 0
        if self.parent[row] != NO_PARENT:
            self._num_borrowers[self.parent[row]] -= 1
        self._is_open[row] = False
        self._free_rows.append(row)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless free slots and owned slots partition the pool, and every
        row that borrows agrees with an open parent.
        """
        rows = np.flatnonzero(self._is_open)
        self._check_owners(rows)
        borrowing = rows[self.parent[rows] != NO_PARENT]
        parents, starts = self.parent[borrowing], self.own_start[borrowing]
        if not self._is_open[parents].all():
            wrong = borrowing[~self._is_open[parents]][:8]
            raise AssertionError(f"rows {wrong.tolist()} borrow from rows that are closed")
        num_borrowers = np.bincount(parents, minlength=len(self.length))
        if not np.array_equal(num_borrowers[rows], self._num_borrowers[rows]):
            raise AssertionError("the number of borrowers of a row is wrong")
        for row, parent, start in zip(borrowing, parents, starts, strict=True):
            if start > self.length[parent] or not np.array_equal(
                self.table[row, :start], self.table[parent, :start]
            ):
                raise AssertionError(f"the prefix of row {row} differs from its parent {parent}")

    def _check_owners(self, rows: RowArray) -> None:
        starts = self.own_start[rows]
        counts = self.length[rows] - starts
        # Where each row's own slots lie in the flattened table, one behind another.
        first = rows * self.table.shape[1] + starts - (counts.cumsum() - counts)
        owned = self.table.reshape(-1)[np.repeat(first, counts) + np.arange(counts.sum())]
        owners = np.bincount(owned, minlength=self.num_slots + 1)
        owners += np.bincount(self._free[: self._num_free], minlength=self.num_slots + 1)
        if owners[0] or (owners[1:] != 1).any():
            wrong = np.flatnonzero(owners != np.arange(len(owners)).clip(max=1))[:8]
            raise AssertionError(f"slots {wrong.tolist()} have {owners[wrong].tolist()} owners")

    def _take(self, num_tokens: int) -> SlotArray:
        if num_tokens > self._num_free:
            raise EnvironmentFault(
                f"{num_tokens} KV slots were asked for, {self._num_free} of {self.num_slots} are "
                "free; raise engine.num_kv_slots or lower engine.max_running"
            )
        self._num_free -= num_tokens
        return self._free[self._num_free : self._num_free + num_tokens].copy()

    def _make_room(self, capacity: int) -> None:
        """Grow the tables so that one more row of ``capacity`` tokens fits."""
        num_rows, width = self.table.shape
        more = 0 if self._free_rows else max(16, num_rows)
        if capacity > width:
            width = max(capacity, 2 * width)
        elif not more:
            return
        table = np.zeros((num_rows + more, width), dtype=np.int32)
        for row in np.flatnonzero(self._is_open):
            # Only what is read: pages of zeros beyond stay untouched.
            table[row, : self.length[row]] = self.table[row, : self.length[row]]
        self.table = table
        self.length, self.own_start, self.parent, self._num_borrowers = (
            np.concatenate([column, np.zeros(more, dtype=np.int64)])
            for column in (self.length, self.own_start, self.parent, self._num_borrowers)
        )
        self._is_open = np.concatenate([self._is_open, np.zeros(more, dtype=np.bool_)])
        self._free_rows.extend(range(num_rows + more - 1, num_rows - 1, -1))


@compiled
def _append(table: SlotArray, length: RowArray, rows: RowArray, slots: SlotArray) -> None:
    for index in range(len(rows)):
        row = rows[index]
        if length[row] >= table.shape[1]:
            raise IndexError("a row was to hold more tokens than it was opened for")
        table[row, length[row]] = slots[index]
        length[row] += 1


@compiled
def _read(table: SlotArray, length: RowArray, rows: RowArray, slots: npt.NDArray[np.int64]) -> None:
    for index in range(len(rows)):
        row = rows[index]
        for place in range(length[row]):
            slots[index, place] = table[row, place]
