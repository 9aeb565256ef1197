"""Branch attention without a mask: which stretch of a row looks at which. Pure numpy.

A row is cut into runs. A run is a stretch of one sample in which every token sees all of the run
before itself: a piece of trunk together with the first branch behind it, or another branch. What a
run sees before itself is one stretch more, from the start of the sample up to the fork (of a
branch) or up to itself (of a trunk behind a block). So attention is a causal square per run and a
rectangle for what came earlier, and branches of one block share their rectangle. None needs a mask,
and the plan grows with the number of branches, not with the tokens.

Context parallelism cuts runs: a piece of a run also sees, all of it, the run before the piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from npr_megatron.records.trajectory import IntArray
from npr_megatron.topology.pairs import changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of queries and a stretch of keys of one row."""

    row: int
    first_query: int
    """Among the tokens of the row that this rank holds, in its order."""
    num_queries: int
    first_key: int
    """Offset in the whole row."""
    num_keys: int

    @property
    def queries(self) -> slice:
        """Where the queries lie among this rank's tokens."""
        return slice(self.first_query, self.first_query + self.num_queries)

    @property
    def keys(self) -> slice:
        """Where the keys lie in the row."""
        return slice(self.first_key, self.first_key + self.num_keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """All that the tokens of one rank look at.

    Example: a trunk of 3 tokens, branches of 2 and 1, a trunk of 1, in a row of its own::

        own      0..5 of themselves (trunk and first branch), 5 of itself, 6 of itself
        earlier  5 looks at 0..3, 6 looks at 0..6
    """

    own: tuple[Part, ...]
    """Causal squares, ``num_queries == num_keys``. Together they hold every query once, save
    padding, which looks at nothing."""
    earlier: tuple[Part, ...]
    """Rectangles: every query sees every key."""

    @property
    def num_parts(self) -> int:
        """Squares and rectangles."""
        return len(self.own) + len(self.earlier)

    @property
    def num_pairs(self) -> int:
        """The number of (query, key) pairs that see one another."""
        squares = sum(part.num_queries * (part.num_queries + 1) // 2 for part in self.own)
        return squares + sum(part.num_queries * part.num_keys for part in self.earlier)


@dataclass(frozen=True, slots=True)
class _Run:
    """Tokens ``start``..``stop`` of a row; they see ``sample``..``fork``, ``fork <= start``, and
    what came before them in the run."""

    sample: int
    fork: int
    start: int
    stop: int

    @property
    def sees_everything(self) -> bool:
        """Whether nothing of the sample is hidden from it."""
        return self.fork == self.start


def attention_plan(
    segment: IntArray, block: IntArray, branch: IntArray, slices: Sequence[tuple[int, int]]
) -> AttentionPlan:
    """Return the plan of packed rows for the rank that holds ``slices`` of them.

    Branches of a block stand next to one another, and no block is entered twice.

    Args:
        segment: [B, S] number of the sample in its row, -1 on padding.
        block: [B, S] 1-based parallel block of a branch token, 0 on the trunk.
        branch: [B, S] 1-based branch, 0 on the trunk.
        slices: from where to where in a row this rank's tokens stand, in its order
            (``topology.context_slices.own_slices``).
    """
    own: list[Part] = []
    earlier: list[Part] = []
    for row in range(segment.shape[0]):
        runs = _runs(segment[row], block[row], branch[row])
        held = 0
        for first, last in slices:
            for run in runs:
                start, stop = max(run.start, first), min(run.stop, last)
                if start < stop:
                    query = held + start - first
                    own.append(_part(row, query, stop - start, start, stop))
                    for key, end in _seen_before(run, start):
                        _add(earlier, _part(row, query, stop - start, key, end))
            held += last - first
    return AttentionPlan(own=tuple(own), earlier=tuple(earlier))


def _runs(segment: IntArray, block: IntArray, branch: IntArray) -> list[_Run]:
    """Return the runs of a row, in order; padding is in none."""
    opens_sample = changes(segment)
    opens_block = opens_sample | changes(block)
    starts = np.flatnonzero(opens_block | changes(branch)).tolist()
    runs: list[_Run] = []
    sample = fork = 0
    for start, stop in zip(starts, [*starts[1:], len(segment)], strict=True):
        if segment[start] < 0:
            continue
        sample = start if opens_sample[start] else sample
        fork = start if opens_block[start] else fork
        last = runs[-1] if runs and sample < start else None
        if last is not None and last.sees_everything and fork == start:
            runs[-1] = replace(last, stop=stop)
        else:
            runs.append(_Run(sample, fork, start, stop))
    return runs


def _seen_before(run: _Run, start: int) -> list[tuple[int, int]]:
    """Return the stretches that the run's tokens from ``start`` on all see."""
    if run.sees_everything:
        stretches = [(run.sample, start)]
    else:
        stretches = [(run.start, start), (run.sample, run.fork)]
    return [(first, last) for first, last in stretches if first < last]


def _part(row: int, query: int, num_queries: int, key: int, end: int) -> Part:
    return Part(
        row=row, first_query=query, num_queries=num_queries, first_key=key, num_keys=end - key
    )


def _add(parts: list[Part], part: Part) -> None:
    """Append ``part``, or lengthen the last one: branches of a block see the same trunk."""
    if parts:
        last = parts[-1]
        is_next = (last.row, last.queries.stop) == (part.row, part.first_query)
        if is_next and last.keys == part.keys:
            parts[-1] = replace(last, num_queries=last.num_queries + part.num_queries)
            return
    parts.append(part)
