"""Which ranks hold, or want, the same thing."""

from __future__ import annotations

import numpy as np

from npr_megatron.weights.plans.intersect import row_numbers
from npr_megatron.weights.plans.tile_table import Ints


class RankSets:
    """The set of ranks of each of many groups; few sets are distinct."""

    def __init__(self, group: Ints, rank: Ints, num_groups: int) -> None:
        """Collect ``rank[i]`` into group ``group[i]``; every group has at least one."""
        first, _ = row_numbers([group, rank])
        self._first_rows = first
        self._key = group[first], rank[first]
        self._num_ranks = 1 + int(rank.max())
        sizes = np.bincount(group[first], minlength=num_groups)
        begins = sizes.cumsum() - sizes
        self.number = np.zeros(num_groups, np.int64)
        """Index into ``sets`` of each group."""
        self.sets: list[tuple[int, ...]] = []
        """Distinct sets, each in ascending order."""
        for size in np.flatnonzero(np.bincount(sizes)):
            groups = np.flatnonzero(sizes == size)
            members = rank[first][begins[groups][:, None] + np.arange(size)]
            rows, number = row_numbers(list(members.T))
            self.number[groups] = number + len(self.sets)
            self.sets += [tuple(int(one) for one in members[row]) for row in rows]

    def row_of(self, group: Ints, rank: Ints) -> Ints:
        """Return the first row in which ``rank`` was named for ``group``, which it must have."""
        groups, ranks = self._key
        position = np.searchsorted(groups * self._num_ranks + ranks, group * self._num_ranks + rank)
        return self._first_rows[position]
