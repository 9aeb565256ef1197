"""The way back to lost keys and values: the stages of known tokens, block by block.

Each piece of the trunk is computed behind the joined branches before it, then the branches behind
it, side by side; the next piece joins them. Nothing is sampled, so the result is what decoding left
behind. The same walk with log-probs is how finished trajectories are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from npr_megatron.engine.sglang.client.rows import Run, Step, walk
from npr_megatron.engine.sglang.stage import Stage
from npr_megatron.records.trajectory import FloatArray, Trajectory

Wave = list[Stage]
"""Stages that may run together; the next wave needs what all of them leave in the cache."""


def replay(runs: Sequence[Run], template: Stage) -> list[Wave]:
    """Return the waves after which the keys and values of ``runs`` are in the cache and leased.

    Args:
        runs: trunk, joined branches, ..., trunk.
        template: names of the stages.
    """
    template = replace(template, keeps=True)
    waves: list[Wave] = []
    for step in walk(runs):
        waves.append([step.row.trunk(template)])
        if step.branches:
            waves.append([step.row.branch(template, run.token_ids) for run in step.branches])
    return waves


@dataclass(frozen=True, slots=True)
class Scored:
    """A stage, and where in the record the log-probs it returns belong."""

    stage: Stage
    first: int
    """Index of the token that the first of them belongs to."""
    num_skipped: int
    """Leading log-probs of tokens that nothing predicts in the record, or that others score."""

    def write(self, scored: Sequence[float], logprobs: FloatArray) -> None:
        """Copy what the stage returned into the record's log-probs."""
        kept = scored[self.num_skipped :]
        logprobs[self.first : self.first + len(kept)] = kept


def scoring(trajectory: Trajectory, runs: Sequence[Run], template: Stage) -> list[list[Scored]]:
    """Return the waves that score ``trajectory``: all but its prompt and what nothing predicts."""
    template = replace(template, keeps=True)
    waves: list[list[Scored]] = []
    for step in walk(runs):
        waves.append([_scored_trunk(trajectory, step, template)])
        if step.branches:
            waves.append([_scored_branch(step, run, template) for run in step.branches])
    return waves


def _scored_trunk(trajectory: Trajectory, step: Step, template: Stage) -> Scored:
    """The token right behind the prompt is predicted, the one right behind a join is not."""
    run, row = step.trunk, step.row
    start = row.num_held if run.index else trajectory.prompt_length - 1
    return Scored(replace(row.trunk(template), score_from=start), start + 1, 0)


def _scored_branch(step: Step, run: Run, template: Stage) -> Scored:
    """The separator predicts ``<step>`` in the first branch; nothing predicts it in the others."""
    row = step.row
    stage = replace(row.branch(template, run.token_ids), score_from=len(row.token_ids) - 1)
    num_skipped = 0 if run.branch == 1 else 1
    return Scored(stage, run.index + num_skipped, num_skipped)


def no_logprobs(trajectory: Trajectory) -> FloatArray:
    """Return [T] zeros, what a record holds where nothing predicts a token."""
    return np.zeros(len(trajectory.token_ids), np.float32)
