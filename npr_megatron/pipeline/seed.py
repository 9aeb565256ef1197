"""The seed model: a small stand-in for an instruct model, trained by the same supervised path.

It can do the task but keeps the schema only now and then. Trained once per description
(architecture, task, phases, seed) and cached beside the runs: it is no part of the method.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from npr_megatron.config.run import RunConfig
from npr_megatron.config.stages import SeedStage, SftPhase
from npr_megatron.data.demonstrations import demonstration_samples
from npr_megatron.data.sources import ProblemSource
from npr_megatron.errors import ConfigError
from npr_megatron.pipeline.context import RunContext
from npr_megatron.pipeline.sft import sft_steps
from npr_megatron.pipeline.starting import random_model
from npr_megatron.records.sample import TrainingSample


def train_seed(context: RunContext, problems: ProblemSource) -> None:
    """Leave the trainer holding the seed model: cached, or trained phase by phase from scratch."""
    cached = cached_seed(context.config)
    if cached.exists():
        context.view.note(f"seed: taken from {cached}")
        context.trainer.load_hf(cached)
        return
    first_step, initial = 0, _random_model(context)
    for number, phase in enumerate(_stage(context.config).phases):
        exported = context.folder.stage("seed") / f"phase-{number}"
        if not exported.exists():
            _train_phase(context, problems, phase, number, first_step, initial)
            context.trainer.export_hf(exported, context.tokenizer_folder)
        first_step, initial = first_step + phase.num_steps, exported
    context.trainer.load_hf(initial)
    _publish_to_cache(initial, cached)


def cached_seed(config: RunConfig) -> Path:
    """Return the cache folder of the seed model that ``config`` describes."""
    parts = (
        config.model,
        config.task,
        _stage(config),
        config.trainer,
        config.parallel,
        config.run.seed,
    )
    text = json.dumps(
        [part if isinstance(part, int) else part.model_dump(mode="json") for part in parts],
        sort_keys=True,
    )
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Path(config.run.output_dir) / "seed-models" / digest


def _stage(config: RunConfig) -> SeedStage:
    if config.seed_stage is None:
        raise ConfigError("a model without model.path needs a [seed_stage] that trains its seed")
    return config.seed_stage


def _train_phase(
    context: RunContext,
    problems: ProblemSource,
    phase: SftPhase,
    number: int,
    first_step: int,
    initial: Path,
) -> None:
    checkpoints = context.folder.checkpoints("seed") / f"phase-{number}"
    last_step = first_step + phase.num_steps
    done = context.start(
        "seed",
        optimizer=phase.optimizer,
        first_step=first_step,
        last_step=last_step,
        initial=initial,
        checkpoints=checkpoints,
    )

    def samples_for(step: int) -> Sequence[TrainingSample]:
        return demonstration_samples(
            problems.problems_for_step("seed", step, phase.samples_per_step),
            phase.mixture,
            context.tokenizer,
            context.prompts,
            context.config.run.seed,
        )

    sft_steps(
        context,
        "seed",
        first_step=done,
        last_step=last_step,
        checkpoints=checkpoints,
        samples_for=samples_for,
    )


def _random_model(context: RunContext) -> Path:
    """Return the folder of the randomly initialised model, written on first use."""
    config = context.config
    folder = context.folder.stage("seed") / "random"
    return random_model(folder, config.model, config.run.seed, context.tokenizer_folder)


def _publish_to_cache(model: Path, cached: Path) -> None:
    """Copy a finished model into the cache; another run doing the same at once is harmless."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_name(f"{cached.name}.{os.getpid()}.partial")
    shutil.copytree(model, partial)
    try:
        partial.rename(cached)
    except OSError:  # the other run was first; its copy is as good
        shutil.rmtree(partial)
