"""The verifier's geometry: boxes in groups, which of them meet, how much they cover together.

Shares nothing with the planner's. A group is whatever boxes may be compared in: a storage of a
rank, a parameter on a node, a copy. Lows and highs are [n, axes], half-open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Spans:
    """Boxes by column."""

    group: Numbers
    low: Numbers
    high: Numbers

    def __len__(self) -> int:
        return len(self.group)

    @property
    def volume(self) -> Numbers:
        """Elements of each box."""
        return np.multiply.reduce(self.high - self.low, axis=1)

    def at(self, rows: Numbers) -> Spans:
        """Return some boxes."""
        return Spans(self.group[rows], self.low[rows], self.high[rows])

    def moved(self, by: Numbers) -> Spans:
        """Return the boxes moved by a vector each."""
        return Spans(self.group, self.low + by, self.high + by)


def common(ones: Spans, others: Spans) -> tuple[Numbers, Numbers, Spans]:
    """Return all pairs of one group that have elements in common, and these elements.

    For each box, candidates come from that axis along which they are fewest.
    """
    one, other = _candidates(ones, others)
    low = np.maximum(ones.low[one], others.low[other])
    high = np.minimum(ones.high[one], others.high[other])
    both = (low < high).all(axis=1)
    one, other = one[both], other[both]
    return one, other, Spans(ones.group[one], low[both], high[both])


def overlaps(spans: Spans) -> Iterator[tuple[int, int]]:
    """Yield pairs of boxes of one group that overlap."""
    one, other, _ = common(spans, spans)
    twice = one < other
    yield from zip(one[twice].tolist(), other[twice].tolist(), strict=True)


def covered(ones: Spans, others: Spans) -> Numbers:
    """Return how many elements of each of ``ones`` lie in ``others``, which are disjoint."""
    one, _, parts = common(ones, others)
    return sums(parts.volume, one, len(ones))


def sums(values: Numbers, index: Numbers, count: int) -> Numbers:
    """Return the sum of ``values`` for each index below ``count``."""
    total = np.zeros(count, np.int64)
    np.add.at(total, index, values)
    return total


def united(spans: Spans, num_groups: int) -> Numbers:
    """Return how many elements the boxes of each group cover together, equal ones counted once."""
    alone = spans.at(_without_doubles(spans))
    one, other, _ = common(alone, alone)
    tangled = np.unique(alone.group[one[one != other]])
    simple = ~np.isin(alone.group, tangled)
    total = sums(alone.volume[simple], alone.group[simple], num_groups)
    for group in tangled.tolist():
        total[group] = _on_grid(alone.at(np.flatnonzero(alone.group == group)))
    return total


def _without_doubles(spans: Spans) -> Numbers:
    columns = np.column_stack([spans.group, spans.low, spans.high])
    order = np.lexsort(columns.T)
    ordered = columns[order]
    new = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))
    return order[new[: len(order)]]


def _on_grid(spans: Spans) -> int:
    """Count elements on the grid of all borders."""
    borders = [
        np.unique(np.concatenate([spans.low[:, axis], spans.high[:, axis]]))
        for axis in range(spans.low.shape[1])
    ]
    inside = np.zeros([len(border) - 1 for border in borders], np.bool_)
    for low, high in zip(spans.low, spans.high, strict=True):
        inside[
            tuple(
                slice(np.searchsorted(border, a), np.searchsorted(border, b))
                for border, a, b in zip(borders, low, high, strict=True)
            )
        ] = True
    sizes = inside.astype(np.int64)
    for border in reversed(borders):
        sizes = sizes @ np.diff(border)
    return int(sizes)


def _candidates(ones: Spans, others: Spans) -> tuple[Numbers, Numbers]:
    if not len(ones) or not len(others):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    orders, begins, counts = zip(
        *(_along(axis, ones, others) for axis in range(ones.low.shape[1])), strict=True
    )
    best = np.argmin(counts, axis=0)
    every = np.arange(len(others))
    count, begin = np.stack(counts)[best, every], np.stack(begins)[best, every]
    other = np.repeat(every, count)
    within = np.arange(len(other)) - np.repeat(count.cumsum() - count, count)
    one = np.stack(orders)[best[other], begin[other] + within]
    return one, other


def _along(axis: int, ones: Spans, others: Spans) -> tuple[Numbers, Numbers, Numbers]:
    """Return ``ones`` in order along ``axis``; for each other, where candidates begin, how many."""
    size = 1 + int(max(ones.high[:, axis].max(), others.high[:, axis].max()))
    order = np.lexsort((ones.low[:, axis], ones.group))
    lows = ones.group[order] * size + ones.low[order, axis]
    furthest = np.maximum.accumulate(ones.group[order] * size + ones.high[order, axis])
    begin = np.searchsorted(furthest, others.group * size + others.low[:, axis], side="right")
    end = np.searchsorted(lows, others.group * size + others.high[:, axis], side="left")
    return order, begin, np.maximum(end - begin, 0)
