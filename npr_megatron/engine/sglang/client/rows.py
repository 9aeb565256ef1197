"""The linear form of a trajectory as SGLang sees it: one row of joined tokens, grown run by run.

Joined branches lie one behind the other in a row although none of them saw its siblings, and what
follows them stands at smaller positions than its place in the row. So everything behind the last
join has one offset (position minus index), and the tokens up to there must be found in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise

import numpy as np

from npr_megatron.engine.flow.segment import Segment
from npr_megatron.engine.sglang.stage import Stage
from npr_megatron.errors import InputError
from npr_megatron.records.trajectory import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Consecutive tokens of one stream, as recorded."""

    block: int
    branch: int
    token_ids: Sequence[int]
    """At least one."""
    position: int
    """Of the first; the others follow."""
    index: int
    """Of the first in the linear form."""


@dataclass(slots=True)
class Row:
    """Joined tokens and how to find their keys and values.

    Example, a trunk of 40 tokens and two joined branches of 9 and 7 behind it::

        Row(token_ids=[...56 ids], offset=-7, num_held=56, join=(40, 9, 7))
    """

    token_ids: list[int] = field(default_factory=list)
    offset: int = 0
    """Position minus index behind the last join."""
    num_held: int = 0
    join: tuple[int, ...] = ()

    @classmethod
    def of(cls, runs: Sequence[Run]) -> Row:
        """Return the row of ``runs``, which end on the trunk: every block is joined."""
        row = cls()
        for step in walk(runs):
            row = step.row
        return row

    def close(self, branches: Sequence[Run]) -> None:
        """Join ``branches``, which open behind the tokens so far."""
        self.join = (len(self.token_ids), *(len(branch.token_ids) for branch in branches))
        for branch in branches:
            self.token_ids += branch.token_ids
        self.num_held = len(self.token_ids)
        end = max(branch.position + len(branch.token_ids) for branch in branches)
        self.offset = end - self.num_held

    def trunk(self, stage: Stage, behind: Sequence[int] = ()) -> Stage:
        """Return ``stage`` over the row and ``behind`` it; it joins the last block if need be."""
        return replace(
            stage,
            token_ids=[*self.token_ids, *behind],
            offset=self.offset,
            num_held=self.num_held,
            join=self.join,
        )

    def branch(self, stage: Stage, own: Sequence[int]) -> Stage:
        """Return ``stage`` over the row and one branch behind it."""
        return replace(
            stage,
            token_ids=[*self.token_ids, *own],
            offset=self.offset,
            num_held=self.num_held,
        )


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of the trunk and the branches behind it."""

    row: Row
    """Up to the end of the piece; grown by the next step."""
    trunk: Run
    branches: list[Run]


def walk(runs: Sequence[Run]) -> Iterator[Step]:
    """Yield the pieces of the trunk in order, each with its branches; join those in between."""
    row, trunk, branches = Row(), None, list[Run]()
    for block, members in groupby(runs, key=lambda run: run.block):
        if block:
            branches = list(members)
            continue
        if trunk is not None:
            yield Step(row, trunk, branches)
            row.close(branches)
        (trunk,), branches = members, []
        row.token_ids += trunk.token_ids
    if trunk is not None:
        yield Step(row, trunk, branches)


def runs_of(segments: Sequence[Segment]) -> list[Run]:
    """Return the runs of a flow's segments."""
    runs: list[Run] = []
    index = 0
    for segment in segments:
        run = Run(
            block=segment.block,
            branch=segment.branch,
            token_ids=segment.token_ids,
            position=segment.position_ids[0],
            index=index,
        )
        runs.append(run)
        index += len(segment.token_ids)
    return runs


def recorded_runs(trajectory: Trajectory) -> list[Run]:
    """Return the runs of a finished trajectory.

    Raises:
        InputError: a stream's positions do not count up one by one, or a branch does not open right
            behind its trunk: rows cannot be laid so.
    """
    block, branch = trajectory.block, trajectory.branch
    is_border = (block[1:] != block[:-1]) | (branch[1:] != branch[:-1])
    bounds = [0, *(np.flatnonzero(is_border) + 1).tolist(), len(block)]
    runs: list[Run] = []
    for start, stop in pairwise(bounds):
        run = Run(
            block=int(block[start]),
            branch=int(branch[start]),
            token_ids=trajectory.token_ids[start:stop].tolist(),
            position=int(trajectory.position_ids[start]),
            index=start,
        )
        due = _position_due(runs, run)
        expected = np.arange(due, due + stop - start)
        if not np.array_equal(trajectory.position_ids[start:stop], expected):
            raise InputError(
                f"trajectory {trajectory.prompt_id}#{trajectory.rollout} was to be scored; its "
                f"tokens {start} to {stop - 1} stand at positions from {run.position} on, expected "
                f"{due} and one by one; the SGLang backend scores the canonical layout only"
            )
        runs.append(run)
    return runs


def _position_due(runs: Sequence[Run], run: Run) -> int:
    """Return where ``run`` begins: behind its trunk, or behind the furthest joined branch."""
    if not runs:
        return 0
    behind = [other for other in runs if other.block == runs[-1].block]
    if run.block:
        behind = [other for other in runs if not other.block][-1:]
    elif not runs[-1].block:
        behind = runs[-1:]
    return max(other.position + len(other.token_ids) for other in behind)
