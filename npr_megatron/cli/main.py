"""The command ``npr``. Imports nothing heavy: each command imports what it needs when it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from npr_megatron import __version__
from npr_megatron.cli.add_tags import add_tags
from npr_megatron.cli.check import check, schema
from npr_megatron.cli.generate import generate
from npr_megatron.cli.pipeline import pipeline
from npr_megatron.cli.report import report
from npr_megatron.cli.serve import serve
from npr_megatron.cli.sft import sft
from npr_megatron.cli.weights import weights
from npr_megatron.errors import ConfigError, NprError

app = typer.Typer(
    name="npr",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(pipeline)
app.command()(sft)
app.command()(generate)
app.command()(serve)
app.command()(report)
app.command()(add_tags)
app.command()(check)
app.command()(schema)
app.add_typer(weights)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"npr-megatron {__version__}")
        raise typer.Exit


@app.callback()
def npr(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Train language models that reason in parallel, and use them.

    Start here:  [bold]npr pipeline examples/quickstart/run.toml[/bold]
    """
    del version


def main() -> None:
    """Run ``npr``; errors raised on purpose become one line per problem and exit code 2."""
    try:
        app()
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        print(_count(len(error.problems)), file=sys.stderr)
        sys.exit(2)
    except NprError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _count(num_problems: int) -> str:
    return "1 problem found" if num_problems == 1 else f"{num_problems} problems found"
