"""The whole run: check, start the machines, go through the stages, measure, report.

Run it again after any interruption and it goes on where it stopped: finished stages are skipped, an
unfinished one resumes at its last checkpoint with the batch that comes next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from npr_megatron.config.check import check_files, check_run
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.run import RunConfig, SumsTask
from npr_megatron.config.stages import STAGES, StageName
from npr_megatron.data.demonstrations import check_mixture
from npr_megatron.data.prompts import PromptBuilder
from npr_megatron.data.sources import ProblemSource, open_source
from npr_megatron.data.sums import is_faithful
from npr_megatron.data.sums_tokenizer import build_sums_tokenizer
from npr_megatron.data.tokenizer import Tokenizer, load_tokenizer
from npr_megatron.errors import ConfigError
from npr_megatron.launch.placement import place
from npr_megatron.launch.preflight import require_environment
from npr_megatron.launch.ray_cluster import RayCluster
from npr_megatron.launch.trainers import TrainerGroup
from npr_megatron.observability.log import set_up_logging
from npr_megatron.observability.metrics import MetricsLog, read_json_lines
from npr_megatron.pipeline.context import RunContext
from npr_megatron.pipeline.folder import RunFolder
from npr_megatron.pipeline.stages import run_stage
from npr_megatron.pipeline.starting import require_rows
from npr_megatron.report.live import LiveView
from npr_megatron.report.page import write_page
from npr_megatron.report.table import stage_table
from npr_megatron.rewards.reading import Reader
from npr_megatron.rollout.fleet import Fleet
from npr_megatron.weights.executors.arena import sweep_dead_arenas
from npr_megatron.weights.layouts import trainer_layout


def run_pipeline(
    config: RunConfig, *, until: StageName | None = None, fresh: bool = False, view: LiveView
) -> Path:
    """Run all stages (or up to ``until``) that are not finished; return the run folder.

    Raises:
        ConfigError: sections of ``config`` contradict each other, or the machine lacks something;
            every problem is listed, before anything is started.
        InputError: a file, tokenizer or an earlier run in the folder is not what ``config`` says.
    """
    model, problems = prepare(config)
    sweep_dead_arenas(config.cluster.arena_dir)
    require_environment(config, model)
    given = Path(config.model.path) if config.model.path else None
    if given is not None:  # refused before anything is written
        load_tokenizer(given, max_plans=config.engine.max_plans)
    folder = RunFolder.of(config)
    folder.open(config, fresh=fresh)
    set_up_logging("driver", path=folder.path / "driver.log")
    tokenizer_folder = given or folder.path / "tokenizer"
    if given is None:
        build_sums_tokenizer(tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder, max_plans=config.engine.max_plans)
    require_rows(model, tokenizer)
    last = STAGES.index(until or STAGES[-1])
    open_stages: list[StageName] = [
        stage
        for stage in STAGES[: last + 1]
        if stage not in folder.finished() and (stage != "seed" or config.seed_stage is not None)
    ]
    if open_stages:
        with _at_work(config, model, folder, tokenizer, tokenizer_folder, view) as context:
            for stage in open_stages:
                run_stage(context, problems, stage)
    _report(folder, view)
    return folder.path


def prepare(config: RunConfig) -> tuple[ModelConfig, ProblemSource]:
    """Check all that can be checked from the files alone.

    Returns:
        The architecture and the problems.

    Raises:
        ConfigError: listing every problem.
    """
    architecture, faults = check_files(config)
    faults = [*faults, *check_run(config, architecture), *_mixture_problems(config)]
    if faults:
        raise ConfigError(faults)
    model = config.model.architecture or architecture
    assert model is not None, "check_run demands a model"
    return model, open_source(config.task, config.run.seed)


def _mixture_problems(config: RunConfig) -> list[str]:
    problems: list[str] = []
    for number, phase in enumerate(config.seed_stage.phases if config.seed_stage else ()):
        try:
            check_mixture(phase.mixture)
        except ConfigError as error:
            problems += [f"seed_stage.phases.{number}: {problem}" for problem in error.problems]
    return problems


@contextmanager
def _at_work(
    config: RunConfig,
    model: ModelConfig,
    folder: RunFolder,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    view: LiveView,
) -> Iterator[RunContext]:
    """Start Ray, the trainer ranks and the fleet; stop them all on the way out."""
    placement = place(config.parallel, config.fleet, config.cluster)
    layout = trainer_layout(model, config.parallel)
    with (
        RayCluster(config.cluster, placement) as cluster,
        TrainerGroup(
            cluster.trainer_seats,
            model=model,
            parallel=config.parallel,
            trainer=config.trainer,
            run_id=folder.path.name,
            arena_dir=config.cluster.arena_dir,
            keeping=config.checkpoint,
        ) as trainer,
        Fleet(
            cluster.replica_seats,
            model,
            # A trainer computes a token with the experts that sampled it.
            config.engine.model_copy(update={"record_routes": model.moe is not None}),
            config.fleet,
            tokenizer.vocabulary,
            source=layout,
            record=folder.path / "serving.json",
        ) as fleet,
    ):
        view.note(f"replicas: process ids {', '.join(map(str, fleet.pids))}")
        yield RunContext(
            config=config,
            folder=folder,
            trainer=trainer,
            fleet=fleet,
            tokenizer=tokenizer,
            tokenizer_folder=tokenizer_folder,
            prompts=PromptBuilder(tokenizer),
            reader=Reader(tokenizer.decode, tokenizer.vocabulary),
            is_faithful=is_faithful if isinstance(config.task, SumsTask) else None,
            metrics=MetricsLog(folder.metrics),
            view=view,
        )


def _report(folder: RunFolder, view: LiveView) -> None:
    evaluations = read_json_lines(folder.evaluations) if folder.evaluations.exists() else []
    if evaluations:
        view.show(stage_table(evaluations))
    view.note(f"report: {write_page(folder.path)}")
    exported = [folder.hf(stage) for stage in folder.finished() if folder.hf(stage).exists()]
    if exported:
        view.note(f"try it: npr generate {exported[-1]}")
