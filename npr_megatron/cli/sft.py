"""``npr sft``: supervised training on one's own files, with any launcher or none."""

from __future__ import annotations

import io
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from npr_megatron.cli.interrupt import interruptible
from npr_megatron.cli.options import Json, Overrides, RunFile
from npr_megatron.config.check_sft import check_sft, check_sft_model
from npr_megatron.config.loader import load_as
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.sft import SftConfig
from npr_megatron.data.conversations import check_rows
from npr_megatron.errors import ConfigError, DivergenceError
from npr_megatron.launch.environment import LaunchedRank, launched_rank

if TYPE_CHECKING:
    from npr_megatron.report.live import LiveView


def sft(
    run_file: RunFile,
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard what an earlier start did.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Judge the run file and every row; no torch, no tokenizer."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read all data and show what is learnt, then stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a model on your own examples: JSON lines, Parquet or a saved HF dataset.

    A row is {"prompt": "...", "response": "..."}, or {"messages": [{"role": "user", "content":
    "..."}, {"role": "assistant", "content": "..."}]}; every assistant message is learnt, and
    nothing else. A response with tags (<guideline>, <plan>, <step>, <takeaway>) is learnt as the
    tree it is: its steps do not see one another. One without tags is plain text.

    Start with examples/sft/run.toml; each field is explained there. Bad rows are named, all at
    once, before training begins. The same command again resumes after the last checkpoint, with
    the batch that comes next. The trained model is RUN_FOLDER/hf, an HF folder.

    Examples:

      npr sft run.toml --check                 (is everything right? seconds, on any machine)

      npr sft run.toml --dry-run               (what is learnt: rows in colour, counts, steps)

      npr sft run.toml                         (one process)

      torchrun --nproc-per-node 8 --no-python npr sft run.toml parallel.dp_size=8

      srun --ntasks-per-node 8 npr sft run.toml parallel.dp_size=16
    """
    place = launched_rank(os.environ)
    try:
        config, model = load_checked_sft(run_file, overrides or [])
        if check:
            _check(config, run_file, as_json=as_json)
            return
        if dry_run:
            _show(config, model)
            return
        _require_ranks(config, place)
    except ConfigError:
        if place.rank:  # rank 0 says the same
            raise typer.Exit(2) from None
        raise
    with interruptible("the same command resumes after the last checkpoint"):
        exported = _run(config, model, place, fresh=fresh, to_stderr=as_json)
    if as_json and place.rank == 0:
        print(json.dumps({"run_folder": str(exported.parent), "model": str(exported)}))


def load_checked_sft(path: Path, overrides: list[str]) -> tuple[SftConfig, ModelConfig]:
    """Return the run and its model, or raise ConfigError with every problem."""
    config = load_as(SftConfig, path, overrides)
    architecture, problems = check_sft_model(config)
    problems = [*problems, *check_sft(config, architecture)]
    if problems:
        raise ConfigError(problems)
    model = config.model.architecture or architecture
    assert model is not None, "the checker demands a model"
    return config, model


def _check(config: SftConfig, run_file: Path, *, as_json: bool) -> None:
    if problems := check_rows([*config.data.train, *config.data.validation]):
        raise ConfigError(problems)
    print(config.model_dump_json(indent=2) if as_json else f"{run_file}: no problem found")


def _require_ranks(config: SftConfig, place: LaunchedRank) -> None:
    wanted, found = config.parallel.world_size, place.world_size
    if wanted != found:
        raise ConfigError(
            f"[parallel] asks for {wanted} ranks and {place.launcher} started {found}; start "
            f"torchrun --nproc-per-node {wanted} --no-python npr sft RUN.toml, or change [parallel]"
        )


def _show(config: SftConfig, model: ModelConfig) -> None:
    from npr_megatron.pipeline.sft_data import preview
    from npr_megatron.report.live import LiveView

    with tempfile.TemporaryDirectory() as folder, LiveView(Console()) as view:
        preview(config, model, Path(folder), view)


def _run(
    config: SftConfig, model: ModelConfig, place: LaunchedRank, *, fresh: bool, to_stderr: bool
) -> Path:
    from npr_megatron.runtime.foreign_warnings import silence_foreign_warnings

    silence_foreign_warnings()
    from npr_megatron.pipeline.sft_run import SftRun
    from npr_megatron.runtime.first_rank import ToldElsewhere

    with _view_of(place, to_stderr=to_stderr) as view:
        try:
            return SftRun(config, model, place, view).run(fresh=fresh)
        except ToldElsewhere:
            raise typer.Exit(2) from None
        except DivergenceError:
            if place.rank:  # every rank knows, rank 0 says it
                raise typer.Exit(2) from None
            raise


def _view_of(place: LaunchedRank, *, to_stderr: bool) -> LiveView:
    from npr_megatron.report.live import LiveView

    silent = Console(file=io.StringIO(), quiet=True)
    return LiveView(silent if place.rank else Console(stderr=to_stderr))
