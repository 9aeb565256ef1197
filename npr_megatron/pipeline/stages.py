"""The stages one by one: seed model, ZERO, rejection sampling, BETA, NPR (paper section 2).

Each takes the model an earlier one exported and exports its own; none needs another's memory. BETA
starts from the seed, not from ZERO: ZERO only supplies data (paper footnote 5).
"""

from __future__ import annotations

from pathlib import Path

from npr_megatron.config.stages import StageName
from npr_megatron.config.training import LossConfig
from npr_megatron.data.samples import sft_sample
from npr_megatron.data.sources import ProblemSource
from npr_megatron.pipeline.context import RunContext
from npr_megatron.pipeline.evaluation import evaluate_stage
from npr_megatron.pipeline.rejection import accepted_path, read_accepted, run_rejection
from npr_megatron.pipeline.rl import RlRecipe, run_rl
from npr_megatron.pipeline.seed import train_seed
from npr_megatron.pipeline.sft import epoch_indices, sft_steps
from npr_megatron.pipeline.versions import num_steps, weight_version
from npr_megatron.records.trajectory import DecodeMode
from npr_megatron.rewards.combine import score_npr, score_zero
from npr_megatron.topology.layout import layout_of
from npr_megatron.train.advantages import dapo_advantages, papo_advantages


def run_stage(context: RunContext, problems: ProblemSource, stage: StageName) -> None:
    """Run one stage to its end, or on from where an earlier start stopped; export and measure."""
    if stage == "sample":
        _sample(context, problems)
        context.folder.finish(stage)
        return
    steps = num_steps(context.config, stage)
    context.view.begin_stage(stage, steps, unit="step")
    {"seed": train_seed, "zero": _zero, "beta": _beta, "npr": _npr}[stage](context, problems)
    context.view.end_stage()
    context.trainer.export_hf(context.folder.hf(stage), context.tokenizer_folder)
    if stage in ("seed", "beta"):  # reinforcement stages have pushed their last step already
        context.push(stage, steps)
    evaluate_stage(context, problems, stage, context.folder.hf(stage))
    context.folder.finish(stage)


def _seed_model(context: RunContext) -> Path:
    """Return the folder of the model that ZERO and BETA start from."""
    given = context.config.model.path
    return Path(given) if given else context.folder.hf("seed")


def _zero(context: RunContext, problems: ProblemSource) -> None:
    recipe = RlRecipe(
        stage="zero",
        settings=context.config.zero,
        mode=DecodeMode.SEQUENTIAL,
        loss=LossConfig(kind="dapo"),
        score=lambda trajectory, problem: score_zero(trajectory, problem.answer, context.reader),
        advantages=dapo_advantages,
    )
    run_rl(context, recipe, problems, _seed_model(context))


def _sample(context: RunContext, problems: ProblemSource) -> None:
    """Sample from ZERO's weights; a resumed run loads and pushes them again first."""
    context.trainer.load_hf(context.folder.hf("zero"))
    version = weight_version(context.config, "sample", 0)
    context.push("sample", 0)
    run_rejection(context, problems, version)


def _beta(context: RunContext, problems: ProblemSource) -> None:
    """Learn the accepted trajectories under the parallel mask, from the seed weights."""
    settings = context.config.beta
    vocabulary = context.tokenizer.vocabulary
    samples = [
        sft_sample(
            trajectory.token_ids,
            trajectory.prompt_length,
            layout_of(trajectory.token_ids, trajectory.prompt_length, vocabulary),
        )
        for trajectory in read_accepted(accepted_path(context))
    ]
    checkpoints = context.folder.checkpoints("beta")
    done = context.start(
        "beta",
        optimizer=settings.optimizer,
        first_step=0,
        last_step=settings.num_steps,
        initial=_seed_model(context),
        checkpoints=checkpoints,
    )
    sft_steps(
        context,
        "beta",
        first_step=done,
        last_step=settings.num_steps,
        checkpoints=checkpoints,
        samples_for=lambda step: [
            samples[index]
            for index in epoch_indices(
                len(samples), settings.samples_per_step, step, context.config.run.seed
            )
        ],
    )


def _npr(context: RunContext, problems: ProblemSource) -> None:
    recipe = RlRecipe(
        stage="npr",
        settings=context.config.npr,
        mode=DecodeMode.PARALLEL,
        loss=LossConfig(kind="papo"),
        score=lambda trajectory, problem: score_npr(
            trajectory, problem.answer, context.reader, malformed=context.config.npr.malformed
        ),
        advantages=papo_advantages,
    )
    run_rl(context, recipe, problems, context.folder.hf("beta"))
