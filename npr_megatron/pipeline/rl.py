"""The reinforcement loop: rollouts, rewards, advantages, one update, push.

ZERO and NPR differ in a row of choices::

    ZERO  sequential rollouts, format + answer reward, DAPO     (paper section 2.2)
    NPR   branch-parallel rollouts, structural filter, PAPO     (paper section 2.4, Eq. 5, 6)

Every rollout batch gives one update on the policy that sampled it, so trainer and engine must agree
on the log-probability of each sampled token; the trainer measures the gap on every step and stops
the run above its limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from npr_megatron.config.alignment import row_multiple
from npr_megatron.config.stages import RlStage
from npr_megatron.config.training import LossConfig
from npr_megatron.data.packing import pack
from npr_megatron.data.problems import Problem
from npr_megatron.data.samples import rl_sample
from npr_megatron.data.sources import ProblemSource
from npr_megatron.pipeline.context import RunContext
from npr_megatron.records.trajectory import DecodeMode, Trajectory
from npr_megatron.rewards.combine import Score
from npr_megatron.train.advantages import FloatVector
from npr_megatron.train.step import StepBatch, StepResult

SAMPLES_SHOWN_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class RlRecipe:
    """What distinguishes ZERO from NPR."""

    stage: Literal["zero", "npr"]
    settings: RlStage
    mode: DecodeMode
    loss: LossConfig
    score: Callable[[Trajectory, Problem], Score]
    advantages: Callable[[Sequence[npt.ArrayLike]], Sequence[FloatVector | None]]
    """Kept rewards of each prompt group to their advantages; None for a group without a signal."""


def run_rl(context: RunContext, recipe: RlRecipe, problems: ProblemSource, initial: Path) -> None:
    """Train one RL stage from ``initial`` weights, or from where an earlier start stopped."""
    done = context.start(
        recipe.stage,
        optimizer=recipe.settings.optimizer,
        first_step=0,
        last_step=recipe.settings.num_steps,
        initial=initial,
        checkpoints=context.folder.checkpoints(recipe.stage),
    )
    context.push(recipe.stage, done)
    for step in range(done + 1, recipe.settings.num_steps + 1):
        rl_step(context, recipe, problems, step)


def rl_step(context: RunContext, recipe: RlRecipe, problems: ProblemSource, step: int) -> None:
    """Sample, learn once, push; then save and log, so that what is saved is what is served."""
    started = time.perf_counter()
    groups, trajectories = rollout(context, recipe, problems, step)
    rollout_s = time.perf_counter() - started

    scores = [
        [recipe.score(trajectory, problem) for trajectory in group]
        for problem, group in zip(groups, trajectories, strict=True)
    ]
    values = rollout_metrics(trajectories, scores, rollout_s)
    result = learn(context, recipe, trajectories, scores)
    values["train/updated"] = float(result is not None and not result.fault)
    push_s = 0.0
    if result is not None:  # else nothing changed: a resumed run comes to the same conclusion
        if result.fault:
            context.view.note(f"step {step} was skipped: {result.fault}")
        values |= step_metrics(result)
        push_s = context.push(recipe.stage, step)
        if step % context.config.checkpoint.every_rl_steps == 0:
            context.trainer.save(context.folder.checkpoints(recipe.stage), {"step": step})
    values |= {"push/s": push_s, "step/s": time.perf_counter() - started}
    context.record(recipe.stage, step, values)
    if step % SAMPLES_SHOWN_EVERY == 1:
        context.keep_sample(recipe.stage, step, trajectories[0][0], scores[0][0].reward)


def rollout(
    context: RunContext, recipe: RlRecipe, problems: ProblemSource, step: int
) -> tuple[Sequence[Problem], list[list[Trajectory]]]:
    """Return the step's problems and their rollouts, ``[P][G]``."""
    chosen = problems.problems_for_step(recipe.stage, step, recipe.settings.prompts_per_step)
    width = recipe.settings.rollouts_per_prompt
    purpose = f"{recipe.stage}/{step}"
    flat = context.decode(context.requests(purpose, chosen, recipe.mode, range(width)))
    return chosen, [flat[start : start + width] for start in range(0, len(flat), width)]


def learn(
    context: RunContext,
    recipe: RlRecipe,
    trajectories: Sequence[Sequence[Trajectory]],
    scores: Sequence[Sequence[Score]],
) -> StepResult | None:
    """Take one optimizer step on the rollouts that carry a signal; None when none does."""
    kept = [
        [trajectory for trajectory, score in zip(group, judged, strict=True) if score.kept]
        for group, judged in zip(trajectories, scores, strict=True)
    ]
    rewards = [[score.reward for score in judged if score.kept] for judged in scores]
    samples = [
        rl_sample(trajectory, float(advantage))
        for group, advantages in zip(kept, recipe.advantages(rewards), strict=True)
        if advantages is not None
        for trajectory, advantage in zip(group, advantages, strict=True)
    ]
    if not samples:
        return None
    config = context.config
    microbatches = pack(
        samples,
        row_tokens=config.trainer.row_tokens,
        rows_per_microbatch=config.trainer.rows_per_microbatch,
        num_replicas=config.parallel.microbatch_multiple,
        row_multiple=row_multiple(config.parallel, config.trainer),
    )
    return context.trainer.train_step(StepBatch(microbatches=microbatches, loss=recipe.loss))


def rollout_metrics(
    trajectories: Sequence[Sequence[Trajectory]], scores: Sequence[Sequence[Score]], seconds: float
) -> dict[str, float]:
    """Return what the rollouts of one step say about the policy."""
    flat = [trajectory for group in trajectories for trajectory in group]
    judged = [score for group in scores for score in group]
    tokens = sum(trajectory.num_tokens for trajectory in flat)
    spread = [np.std([score.reward for score in group if score.kept] or [0.0]) for group in scores]
    return {
        "rollout/reward": float(np.mean([score.reward for score in judged])),
        "rollout/validity": float(np.mean([score.is_valid for score in judged])),
        "rollout/accuracy": float(
            np.mean([score.is_valid and score.is_correct for score in judged])
        ),
        "rollout/keep_frac": float(np.mean([score.kept for score in judged])),
        "rollout/flat_groups_frac": float(np.mean([value == 0 for value in spread])),
        "rollout/tokens": tokens / len(flat),
        "rollout/critical_path_tokens": float(
            np.mean([trajectory.critical_path_tokens for trajectory in flat])
        ),
        "rollout/tokens_per_s": tokens / seconds,
        "rollout/s": seconds,
    }


def step_metrics(result: StepResult) -> dict[str, float]:
    """Return what the optimizer step says."""
    return {
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": result.learning_rate,
        "train/policy_logprob": result.mean_policy_logprob,
        "train/entropy": result.mean_entropy,
        "train/skipped": float(result.skipped),
        "train/logprob_gap_max": result.max_logprob_gap,
        "train/logprob_gap_mean": result.mean_logprob_gap,
        "train/num_loss_tokens": float(result.num_loss_tokens),
    }
