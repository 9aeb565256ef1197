"""``npr pipeline``: the stages of a run, one after another, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from npr_megatron.cli.interrupt import interruptible
from npr_megatron.cli.options import Json, Overrides, RunFile, load_checked
from npr_megatron.config.run import RunConfig
from npr_megatron.config.stages import STAGES, StageName
from npr_megatron.errors import ConfigError


def pipeline(
    run_file: RunFile,
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option(help="Same as run.seed=N.")] = None,
    until: Annotated[
        str | None, typer.Option(metavar="STAGE", help=f"Last stage to run: {', '.join(STAGES)}.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard what an earlier start did.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, print what would run, start nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a model through all stages: seed, ZERO, sampling, BETA, NPR.

    The same command again resumes after the last finished step. Ctrl-C is safe at any time.

    Examples:

      npr pipeline examples/quickstart/run.toml

      npr pipeline examples/quickstart/run.toml --seed 1 --until zero

      npr pipeline run.toml --dry-run parallel.tp_size=2 zero.num_steps=3
    """
    changes = [*(overrides or []), *([] if seed is None else [f"run.seed={seed}"])]
    config = load_checked(run_file, changes)
    last = None if until is None else _stage(until)
    if dry_run:
        if as_json:
            print(config.model_dump_json(indent=2))
        else:
            Console().print(describe(config, last))
        return
    with interruptible("the same command resumes after the last finished step"):
        run_folder = _run(config, until=last, fresh=fresh, to_stderr=as_json)
    if as_json:
        print(json.dumps(_result(run_folder)))


def _stage(text: str) -> StageName:
    names: list[str] = list(STAGES)
    if text not in names:
        raise ConfigError(f"--until {text!r} is no stage; choose one of {', '.join(STAGES)}")
    return STAGES[names.index(text)]


def describe(config: RunConfig, until: StageName | None) -> Table:
    """Return what a run would do, as a table."""
    parallel = config.parallel
    table = Table(title=f"{config.run.name}, seed {config.run.seed}", title_justify="left")
    table.add_column("part", style="cyan", no_wrap=True)
    table.add_column("what would run")
    table.add_row("model", config.model.path or "a new one, trained by the seed stage")
    table.add_row(
        "trainer",
        f"{parallel.world_size} ranks = tp {parallel.tp_size} x pp {parallel.pp_size} "
        f"x dp {parallel.dp_size}, {config.trainer.dtype}",
    )
    table.add_row("engines", f"{config.fleet.num_replicas} replicas, {config.engine.dtype}")
    for name, work in _stage_lines(config).items():
        table.add_row(name, work)
        if name == until:
            break
    table.add_row("results", f"{config.run.output_dir}/{config.run.name}-seed{config.run.seed}")
    return table


def _stage_lines(config: RunConfig) -> dict[str, str]:
    """Return one line of work per stage, in order."""
    lines: dict[str, str] = {}
    if config.seed_stage is not None:
        lines["seed"] = " then ".join(
            f"{phase.num_steps} steps of {phase.samples_per_step} demonstrations"
            for phase in config.seed_stage.phases
        )
    for name, stage in (("zero", config.zero), ("npr", config.npr)):
        lines[name] = (
            f"{stage.num_steps} steps of {stage.prompts_per_step} prompts x "
            f"{stage.rollouts_per_prompt} rollouts"
        )
    lines["sample"] = (
        f"until {config.sample.num_accepted} are accepted, up to {config.sample.max_trials} "
        "trials each"
    )
    lines["beta"] = (
        f"{config.beta.num_steps} steps of {config.beta.samples_per_step} accepted answers"
    )
    return {name: lines[name] for name in STAGES if name in lines}


def _run(config: RunConfig, *, until: StageName | None, fresh: bool, to_stderr: bool) -> Path:
    from npr_megatron.pipeline.run import run_pipeline
    from npr_megatron.report.live import LiveView

    with LiveView(Console(stderr=to_stderr)) as view:
        return run_pipeline(config, until=until, fresh=fresh, view=view)


def _result(run_folder: Path) -> dict[str, object]:
    from npr_megatron.report.page import read_optional_lines

    return {
        "run_folder": str(run_folder),
        "report": str(run_folder / "report.html"),
        "evaluations": read_optional_lines(run_folder / "evaluations.jsonl"),
    }
