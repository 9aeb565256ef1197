"""Which KV slot holds which token of which row. Integers only; the tensors live in
``engine.model``.

A *row* is an ordered list of slots: the keys one stream of tokens may read. Rows form a tree. A row
opened on a parent borrows the parent's slots as its prefix and owns only what it appends: rollouts
borrow from their prompt, branches borrow from their trunk. Fork and join therefore move no key or
value:

    fork   a branch row starts as an alias of the trunk's slots
    join   the trunk row takes over the slots its branches own, in branch order

Invariants (``check_integrity``): every slot is free or owned by exactly one row, so nothing can be
freed twice; a borrowed prefix equals the beginning of its parent; a row that lends is never closed.
Slot 0 is a dummy that pads index tables and is never handed out.

This module knows nothing of budgets or requests; ``engine.scheduler`` reserves, so ``append``
cannot run dry.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from npr_megatron.errors import EnvironmentFault

SlotArray = npt.NDArray[np.int32]
RowArray = npt.NDArray[np.int64]

_NO_PARENT = -1


class SlotPool:
    """The slots of one KV cache and the rows that own them.

    ``table[row, :length[row]]`` lists the slots row ``row`` reads, oldest first; entries beyond are
    arbitrary valid slots. Both arrays are read by the batch assembly and must not be written
    elsewhere.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = np.arange(num_slots, 0, -1, dtype=np.int32)
        self._num_free = num_slots
        self._free_rows: list[int] = []
        self._live_rows: set[int] = set()
        self.table: SlotArray = np.zeros((0, 64), dtype=np.int32)
        self.length: RowArray = np.zeros(0, dtype=np.int64)
        self._own_start: RowArray = np.zeros(0, dtype=np.int64)
        self._parent: RowArray = np.zeros(0, dtype=np.int64)
        self._num_borrowers: RowArray = np.zeros(0, dtype=np.int64)

    @property
    def num_free(self) -> int:
        """Slots nobody owns."""
        return self._num_free

    @property
    def num_rows(self) -> int:
        """Rows open now."""
        return len(self._live_rows)

    def open_row(self, parent: int | None, capacity: int) -> int:
        """Open a row that reads everything ``parent`` reads now and owns nothing yet.

        Args:
            parent: a live row to borrow from, or None for an empty beginning.
            capacity: tokens the row will ever hold, borrowed ones included.
        """
        self._make_room(capacity)
        row = self._free_rows.pop()
        self._live_rows.add(row)
        length = 0
        if parent is not None:
            length = int(self.length[parent])
            self.table[row, :length] = self.table[parent, :length]
            self._num_borrowers[parent] += 1
        self.length[row] = self._own_start[row] = length
        self._parent[row] = _NO_PARENT if parent is None else parent
        self._num_borrowers[row] = 0
        return row

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
        self.table[rows, self.length[rows]] = slots
        self.length[rows] += 1
        return slots

    def read(self, row: int) -> SlotArray:
        """Return a copy of the slots ``row`` reads."""
        return self.table[row, : self.length[row]].copy()

    def read_own(self, row: int) -> SlotArray:
        """Return a copy of the slots ``row`` owns."""
        return self.table[row, self._own_start[row] : self.length[row]].copy()

    def absorb(self, row: int, branch_rows: Sequence[int]) -> None:
        """Join: move what ``branch_rows`` own to the end of ``row``, in order, and close them."""
        for branch_row in branch_rows:
            own = self.table[branch_row, self._own_start[branch_row] : self.length[branch_row]]
            start = self.length[row]
            self.table[row, start : start + len(own)] = own
            self.length[row] = start + len(own)
            self._own_start[branch_row] = self.length[branch_row]
            self.close(branch_row)

    def close(self, row: int) -> None:
        """Free the slots ``row`` owns and forget it. No row may borrow from it any more."""
        if self._num_borrowers[row]:
            raise AssertionError(f"row {row} is closed while {self._num_borrowers[row]} borrow it")
        own = self.table[row, self._own_start[row] : self.length[row]]
        self._free[self._num_free : self._num_free + len(own)] = own
        self._num_free += len(own)
        if self._parent[row] != _NO_PARENT:
            self._num_borrowers[self._parent[row]] -= 1
        self._live_rows.remove(row)
        self._free_rows.append(row)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless free slots and owned slots partition the pool."""
        owners = np.zeros(self.num_slots + 1, dtype=np.int64)
        np.add.at(owners, self._free[: self._num_free], 1)
        borrowers = np.zeros_like(self._num_borrowers)
        for row in self._live_rows:
            np.add.at(owners, self.read_own(row), 1)
            parent, start = self._parent[row], self._own_start[row]
            if parent == _NO_PARENT:
                continue
            borrowers[parent] += 1
            if parent not in self._live_rows:
                raise AssertionError(f"row {row} borrows from row {parent}, which is closed")
            if not np.array_equal(self.table[row, :start], self.table[parent, :start]):
                raise AssertionError(f"the prefix of row {row} differs from its parent {parent}")
        if owners[0] or (owners[1:] != 1).any():
            wrong = np.flatnonzero(owners[1:] != 1)[:8] + 1
            raise AssertionError(f"slots {wrong.tolist()} have {owners[wrong].tolist()} owners")
        live = sorted(self._live_rows)
        if not np.array_equal(borrowers[live], self._num_borrowers[live]):
            raise AssertionError("the number of borrowers of a row is wrong")

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
        if capacity > width:
            wider = np.zeros((num_rows, max(capacity, 2 * width)), dtype=np.int32)
            wider[:, :width] = self.table
            self.table = wider
        if not self._free_rows:
            more = max(16, num_rows)
            self.table = np.concatenate(
                [self.table, np.zeros((more, self.table.shape[1]), np.int32)]
            )
            fresh = np.zeros(more, dtype=np.int64)
            self.length = np.concatenate([self.length, fresh])
            self._own_start = np.concatenate([self._own_start, fresh])
            self._parent = np.concatenate([self._parent, fresh])
            self._num_borrowers = np.concatenate([self._num_borrowers, fresh])
            self._free_rows.extend(range(num_rows + more - 1, num_rows - 1, -1))
