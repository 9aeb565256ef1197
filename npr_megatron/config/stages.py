"""The stages of a run: seed model, ZERO, rejection sampling, BETA, NPR (PAPO)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from npr_megatron.config.base import Section
from npr_megatron.config.checkpoint import CheckpointKeeping
from npr_megatron.config.training import OptimizerConfig


class SamplingConfig(Section):
    """How rollouts are sampled."""

    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: PositiveInt = 256
    """Total generated tokens over all branches."""
    max_critical_path: PositiveInt = 256
    """Longest generated path."""


class SftPhase(Section):
    """One supervised phase over generated or given samples."""

    num_steps: PositiveInt
    samples_per_step: PositiveInt
    optimizer: OptimizerConfig
    mixture: dict[str, float] = Field(default_factory=dict)
    """Share of each kind of demonstration (``data.demonstrations``); seed phases only."""


class SeedStage(Section):
    """Trains the stand-in for an instruct model; skipped where ``model.path`` names one."""

    phases: tuple[SftPhase, ...]


class RlStage(Section):
    """Reinforcement: ZERO as it stands (sequential, DAPO)."""

    num_steps: PositiveInt
    prompts_per_step: PositiveInt = 16
    rollouts_per_prompt: int = Field(default=16, ge=2)
    optimizer: OptimizerConfig


class NprStage(RlStage):
    """PAPO inside the parallel engine."""

    malformed: Literal["drop", "wrong"] = "drop"
    """``drop`` learns nothing from a malformed rollout (the paper); ``wrong`` gives it -1.

    Dropping is free for the policy: at small models' learning rates it drifts into breaking the
    schema on hard problems (quickstart, 4e-4, 40 steps: validity 0.96 -> 0.63).
    """


class SampleStage(Section):
    """Rejection sampling from ZERO."""

    num_accepted: PositiveInt
    """Stop when so many trajectories are kept."""
    max_trials: PositiveInt = 8
    """Rollouts per prompt before it is given up."""
    prompts_per_round: PositiveInt = 128


class BetaStage(SftPhase):
    """SFT from the seed under the parallel mask."""


class EvaluationConfig(Section):
    """Measured before and after each stage."""

    num_problems: PositiveInt = 384
    rollouts_per_problem: PositiveInt = 1
    speed_problems: NonNegativeInt = 16
    """Problems decoded one at a time, both ways, for the speed ratio."""


class CheckpointConfig(CheckpointKeeping):
    """When the trainer's state goes to disk, and how."""

    every_rl_steps: PositiveInt = 1
    every_sft_steps: PositiveInt = 50


StageName = Literal["seed", "zero", "sample", "beta", "npr"]
STAGES: tuple[StageName, ...] = ("seed", "zero", "sample", "beta", "npr")
