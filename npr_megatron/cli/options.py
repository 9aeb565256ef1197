"""Arguments that several commands share, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from npr_megatron.config.check import check_all
from npr_megatron.config.loader import load_run
from npr_megatron.config.run import RunConfig
from npr_megatron.errors import ConfigError

RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]",
        help="Replace fields of the run file; values are TOML, strings may be bare.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts on stdout.")]


def load_checked(path: Path, overrides: list[str]) -> RunConfig:
    """Return the run, or raise ConfigError with every problem in it and in the files it names."""
    config = load_run(path, overrides)
    problems = check_all(config)
    if problems:
        raise ConfigError(problems)
    return config
