"""What a set of finished rollouts says about a model. Pure; runs nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from npr_megatron.data.problems import Problem
from npr_megatron.errors import InputError
from npr_megatron.records.trajectory import DecodeMode, Trajectory
from npr_megatron.rewards.combine import is_right
from npr_megatron.rewards.reading import BlockStrings, Reader

FaithfulCheck = Callable[[str, Sequence[BlockStrings]], bool]
"""(question, texts of the blocks) -> whether every step and takeaway is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One measurement. Shares are of all rollouts, means are per rollout."""

    mode: DecodeMode
    num_rollouts: int
    validity: float
    """Share that keeps the format, box included."""
    accuracy: float
    """Share that keeps the format and has the right answer."""
    correct_frac: float
    """Share with the right answer in its last box, whatever the format."""
    trigger_rate: float
    """Share that is well-formed with at least one block, executed or (sequential) written."""
    faithfulness: float | None
    """Share that is well-formed with every step and takeaway right; None where nobody can tell."""
    total_tokens: float
    critical_path_tokens: float
    """Mean length of the longest path; equals ``total_tokens`` in sequential mode."""
    num_blocks: float
    """Complete blocks."""
    branches_per_block: float
    """Mean over all complete blocks; 0.0 if there is none."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ``mode`` as a string."""
        return {**dataclasses.asdict(self), "mode": self.mode.value}


def evaluate(
    trajectories: Sequence[Trajectory],
    problems: Iterable[Problem],
    reader: Reader,
    is_faithful: FaithfulCheck | None = None,
) -> Evaluation:
    """Measure rollouts of one decode mode.

    Args:
        trajectories: at least one; ``prompt_id`` names the problem.
        problems: holds at least the problems asked.
        is_faithful: judge of steps and takeaways; None leaves faithfulness out.

    Raises:
        InputError: no trajectories, mixed modes, a trajectory of an unknown problem, or one that
            the policy did not end itself: it is no mistake, and without it the shares are biased.
    """
    known = {problem.id: problem for problem in problems}
    mode = _common_mode(trajectories, known)
    rows = [_judge(t, known[t.prompt_id], reader, is_faithful) for t in trajectories]
    widths = [width for row in rows for width in row.widths]
    return Evaluation(
        mode=mode,
        num_rollouts=len(rows),
        validity=fmean(row.is_valid for row in rows),
        accuracy=fmean(row.is_valid and row.is_correct for row in rows),
        correct_frac=fmean(row.is_correct for row in rows),
        trigger_rate=fmean(row.is_triggered for row in rows),
        faithfulness=fmean(row.is_faithful for row in rows) if is_faithful else None,
        total_tokens=fmean(t.num_tokens for t in trajectories),
        critical_path_tokens=fmean(t.critical_path_tokens for t in trajectories),
        num_blocks=len(widths) / len(rows),
        branches_per_block=fmean(widths) if widths else 0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    is_valid: bool
    is_correct: bool
    is_triggered: bool
    is_faithful: bool
    widths: tuple[int, ...]


def _judge(
    trajectory: Trajectory, problem: Problem, reader: Reader, is_faithful: FaithfulCheck | None
) -> _Row:
    response_ids = trajectory.response_ids
    reading = reader.read(response_ids)
    is_well_formed = reading.result.document is not None
    is_executed = trajectory.mode is DecodeMode.SEQUENTIAL or trajectory.num_blocks > 0
    return _Row(
        is_valid=reading.is_valid,
        is_correct=is_right(reading, problem.answer),
        is_triggered=is_well_formed and is_executed,
        is_faithful=is_well_formed
        and is_faithful is not None
        and is_faithful(problem.question, reader.block_strings(response_ids, reading)),
        widths=tuple(len(block.plans) for block in reading.result.blocks),
    )


def _common_mode(trajectories: Sequence[Trajectory], known: dict[str, Problem]) -> DecodeMode:
    modes = {trajectory.mode for trajectory in trajectories}
    if len(modes) != 1:
        raise InputError(
            f"rollouts of one decode mode were to be measured; found {sorted(modes) or 'none'}; "
            "measure the modes one by one"
        )
    unknown = sorted({t.prompt_id for t in trajectories} - known.keys())
    if unknown:
        raise InputError(
            f"every rollout must belong to a given problem; found rollouts of {unknown[:5]}; pass "
            "the problems they were asked"
        )
    cut = [
        f"{t.prompt_id} #{t.rollout} ({t.finish})"
        for t in trajectories
        if not t.finish.is_of_policy
    ]
    if cut:
        raise InputError(
            f"every rollout must be ended by the policy itself; found {len(cut)} that were not, "
            f"first {cut[0]}; measure without time limits and aborts"
        )
    return modes.pop()
