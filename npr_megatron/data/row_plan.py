"""Which samples share a row, and which rows a step takes: an endless stream of packed rows.

An epoch is shuffled, packed first-fit decreasing window by window (a window is many rows long, so
little room is lost), and its rows are shuffled again. Epochs follow one another without a seam, so
every step but the last of a run takes equally many full rows. Everything derives from the lengths,
the seed and the number of the row: a resumed run needs to know nothing but its step.
"""

from __future__ import annotations

import numpy as np

from npr_megatron.data.packing import Index, first_fit_decreasing
from npr_megatron.records.randomness import derive_seed, uniforms

_WINDOW_ROWS = 256
"""Rows' worth of tokens packed together; one row of them may stay half empty."""

Row = tuple[int, ...]
"""Numbers of the samples that stand in one row, left to right."""


class RowStream:
    """Rows of samples, epoch after epoch.

    Example::

        stream = RowStream(lengths, row_tokens=4096, seed=0)
        stream.take(first=step * 64, count=64)      # the rows of a step, whenever asked
    """

    def __init__(self, lengths: Index, row_tokens: int, seed: int) -> None:
        """Needs samples, none longer than ``row_tokens``."""
        assert len(lengths) and lengths.max() <= row_tokens, "the reader refuses longer samples"
        self._lengths, self._row_tokens, self._seed = lengths, row_tokens, seed
        self._sizes: list[int] = []  # rows of each epoch planned so far
        self._last: tuple[int, list[Row]] = (-1, [])

    def num_rows(self, num_epochs: int) -> int:
        """Return how many rows the first ``num_epochs`` epochs fill."""
        while len(self._sizes) < num_epochs:
            self._epoch(len(self._sizes))
        return sum(self._sizes[:num_epochs])

    def epoch_of(self, row: int) -> int:
        """Return the epoch, from 0, that row number ``row`` belongs to."""
        epoch = 0
        while self.num_rows(epoch + 1) <= row:
            epoch += 1
        return epoch

    def take(self, first: int, count: int) -> list[Row]:
        """Return rows number ``first`` to ``first + count - 1``, counted from 0."""
        epoch = self.epoch_of(first)
        start = first - self.num_rows(epoch)
        rows: list[Row] = []
        while len(rows) < count:
            rows += self._epoch(epoch)[start : start + count - len(rows)]
            epoch, start = epoch + 1, 0
        return rows

    def _epoch(self, epoch: int) -> list[Row]:
        if self._last[0] != epoch:
            rows = plan_epoch(self._lengths, self._row_tokens, self._seed, epoch)
            if epoch == len(self._sizes):
                self._sizes.append(len(rows))
            self._last = (epoch, rows)
        return self._last[1]


def plan_epoch(lengths: Index, row_tokens: int, seed: int, epoch: int) -> list[Row]:
    """Return the rows of one epoch; every sample stands in exactly one."""
    order = _shuffled(len(lengths), derive_seed("samples", seed, epoch))
    window = np.cumsum(lengths[order]) // (_WINDOW_ROWS * row_tokens)
    borders = np.flatnonzero(np.diff(window)) + 1
    rows: list[Row] = []
    for members in np.split(order, borders):
        row, offset = first_fit_decreasing(lengths[members], row_tokens)
        by_place = np.lexsort((offset, row))
        starts = np.flatnonzero(np.diff(row[by_place])) + 1
        rows += [tuple(part.tolist()) for part in np.split(members[by_place], starts)]
    return [rows[i] for i in _shuffled(len(rows), derive_seed("rows", seed, epoch))]


def _shuffled(count: int, key: int) -> Index:
    keys = np.full(count, key, dtype=np.uint64)
    return np.argsort(uniforms(keys, np.arange(count, dtype=np.uint64)), kind="stable")
