"""Rejection sampling: keep one correct, well-formed trajectory per problem (paper section 2.3).

Rounds are fixed by their number alone (problems, seeds), and the accepted trajectories of a round
are on disk before the next one starts: a killed run repeats at most one round, with equal results.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from npr_megatron.data.problems import Problem
from npr_megatron.data.sources import ProblemSource
from npr_megatron.errors import InputError
from npr_megatron.pipeline.context import RunContext
from npr_megatron.records.trajectory import DecodeMode, Trajectory
from npr_megatron.rewards.combine import score_zero


def accepted_path(context: RunContext) -> Path:
    """Return the file of accepted trajectories."""
    return context.folder.stage("sample") / "accepted.jsonl"


def read_accepted(path: Path) -> list[Trajectory]:
    """Return the accepted trajectories of all complete rounds."""
    if not path.exists():
        return []
    rounds = [json.loads(line) for line in path.read_text().splitlines()]
    return [Trajectory.from_json(item) for entry in rounds for item in entry["accepted"]]


def run_rejection(context: RunContext, problems: ProblemSource, version: int) -> None:
    """Sample from the weights the fleet holds until ``sample.num_accepted`` trajectories are kept.

    Raises:
        InputError: too few are accepted in eight times the rounds a perfect policy needs; the
            policy is too weak to distil from.
    """
    settings = context.config.sample
    path = accepted_path(context)
    rounds = path.read_text().splitlines() if path.exists() else []
    accepted = len(read_accepted(path))
    number = len(rounds)
    context.view.begin_stage("sample", settings.num_accepted, unit="accepted")
    limit = 2 + 8 * settings.num_accepted // settings.prompts_per_round
    while accepted < settings.num_accepted:
        number += 1
        if number > limit:
            raise InputError(
                f"rejection sampling was to keep {settings.num_accepted} trajectories; {accepted} "
                f"were accepted in {limit} rounds; train ZERO longer or lower sample.num_accepted"
            )
        chosen = problems.problems_for_step("sample", number, settings.prompts_per_round)
        kept, trials = accept_round(context, chosen, version)
        kept = kept[: settings.num_accepted - accepted]
        accepted += len(kept)
        context.folder.append(path, {"round": number, "accepted": [t.to_json() for t in kept]})
        context.view.advance(
            accepted,
            {
                "sample/accepted_frac": len(kept) / trials,
                "sample/trials_per_prompt": trials / len(chosen),
            },
        )
    context.view.end_stage()


def accept_round(
    context: RunContext, chosen: Sequence[Problem], version: int
) -> tuple[list[Trajectory], int]:
    """Try each problem up to ``sample.max_trials`` times; return what was kept and the trials."""
    open_problems = list(chosen)
    accepted: list[Trajectory] = []
    trials = 0
    for trial in range(context.config.sample.max_trials):
        if not open_problems:
            break
        requests = context.requests(
            f"sample/{version}", open_problems, DecodeMode.SEQUENTIAL, [trial]
        )
        trials += len(requests)
        still_open = []
        for problem, trajectory in zip(open_problems, context.decode(requests), strict=True):
            verdict = score_zero(trajectory, problem.answer, context.reader)
            if verdict.is_valid and verdict.is_correct:
                accepted.append(trajectory)
            else:
                still_open.append(problem)
        open_problems = still_open
    return accepted, trials
