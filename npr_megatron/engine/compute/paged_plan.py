"""Batches in the index form of paged attention, one slot per page. numpy only.

Paged kernels take ragged rows as they are: row r has the queries ``query_indptr[r] ..
query_indptr[r + 1]`` and reads the slots ``key_indptr[r] .. key_indptr[r + 1]`` of a flat list.
With pages of one slot any order of slots is a row, so a join costs nothing here either.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npr_megatron.engine.compute.decode_rows import DecodeRows
from npr_megatron.engine.schedule.batch import Batch, IndexArray, QueryGroup
from npr_megatron.records.trajectory import BoolArray

Int32Array = npt.NDArray[np.int32]

_MIN_SHARED = 1024
"""Slots in front that rows must share to be worth reading once for all of them."""


@dataclass(frozen=True, slots=True, eq=False)
class PagedRows:
    """R rows of queries, each reading its own list of slots."""

    tokens: IndexArray
    """[Q] tokens of the flat batch whose queries these are, row after row."""
    query_indptr: Int32Array
    """[R + 1]"""
    key_indptr: Int32Array
    """[R + 1]"""
    key_slots: Int32Array
    mask: BoolArray | None = None
    """Queries times keys of each row, flat, row after row. None: the last query of a row sees all
    its slots, the one before it all but the last, and so on.
    """


def paged_rows(batch: Batch) -> tuple[PagedRows | None, PagedRows | None]:
    """Return the rows of ``batch`` that are causal, and those that need a mask."""
    causal, masked = _Collector(), _Collector()
    for group in batch.groups:
        for tokens, slots, mask in _rows_of(group):
            num_queries, num_keys = mask.shape
            last_seen = np.arange(num_keys - num_queries, num_keys)[:, None]
            if np.array_equal(mask, np.arange(num_keys) <= last_seen):
                causal.add(tokens, slots)
            else:
                masked.add(tokens, slots, mask)
    return causal.rows() if causal else None, masked.rows() if masked else None


def _rows_of(group: QueryGroup) -> list[tuple[IndexArray, IndexArray, BoolArray]]:
    """Return per row its tokens, the slots any of its queries sees, and who sees which."""
    num_rows, width = group.keys.shape
    num_queries = group.count if group.padded is None else len(group.padded)
    run = num_queries // num_rows
    kept = np.arange(group.count) if group.kept is None else group.kept
    bounds = np.searchsorted(kept, np.arange(num_rows + 1) * run)
    rows: list[tuple[IndexArray, IndexArray, BoolArray]] = []
    for row in range(num_rows):
        count = int(bounds[row + 1] - bounds[row])
        tokens = group.start + np.arange(bounds[row], bounds[row + 1])
        if group.lengths is not None:
            seen = np.arange(width)[None] < group.lengths[row]
        else:
            assert group.visible is not None
            seen = group.visible[row, :count]
        columns = seen.any(axis=0)
        rows.append((tokens, group.keys[row, columns], seen[:, columns]))
    return rows


class _Collector:
    """Rows one after another, all with a mask or all without."""

    def __init__(self) -> None:
        self._tokens: list[IndexArray] = []
        self._slots: list[IndexArray] = []
        self._masks: list[BoolArray] = []

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def add(self, tokens: IndexArray, slots: IndexArray, mask: BoolArray | None = None) -> None:
        self._tokens.append(tokens)
        self._slots.append(slots)
        if mask is not None:
            self._masks.append(mask.reshape(-1))

    def rows(self) -> PagedRows:
        return PagedRows(
            tokens=np.concatenate(self._tokens),
            query_indptr=indptr([len(tokens) for tokens in self._tokens]),
            key_indptr=indptr([len(slots) for slots in self._slots]),
            key_slots=np.concatenate(self._slots).astype(np.int32),
            mask=np.concatenate(self._masks) if self._masks else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Cascade:
    """Rows that read a shared beginning once for all that share it, then each its own end.

    Both levels hold the same queries in the same order; their results are to be merged by
    log-sum-exp.
    """

    shared: PagedRows
    """A row per beginning, with the queries of all rows that share it; each query sees all of it,
    so it is not causal.
    """
    own: PagedRows
    """A row per query."""
    num_saved: int
    """Slots not read again, against reading every row by itself."""


def cascade_of(rows: DecodeRows) -> Cascade | None:
    """Return ``rows`` in two levels, None where no two of them share a long beginning.

    A row that shares with nobody keeps its last slot to itself and shares the rest with itself, so
    that no level of any row is empty.
    """
    if max(rows.num_shared) < _MIN_SHARED or int(rows.lengths.min()) < 2:
        return None
    shared, own = _Collector(), _Collector()
    num_saved = start = 0
    for block, lengths, num_shared in zip(
        rows.blocks, rows.block_lengths, rows.num_shared, strict=True
    ):
        tokens = start + np.arange(len(block))
        is_family = num_shared >= _MIN_SHARED
        if is_family:
            shared.add(tokens, block[0, :num_shared])
            num_saved += (len(block) - 1) * num_shared
        for token, slots, length in zip(tokens, block, lengths.tolist(), strict=True):
            end = num_shared if is_family else length - 1
            if not is_family:
                shared.add(tokens[token - start : token - start + 1], slots[:end])
            own.add(tokens[token - start : token - start + 1], slots[end:length])
        start += len(block)
    return Cascade(shared.rows(), own.rows(), num_saved)


def indptr(counts: list[int] | IndexArray) -> Int32Array:
    """Return [R + 1] where each of R consecutive pieces begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
