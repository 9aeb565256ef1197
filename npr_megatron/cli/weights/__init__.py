"""``npr weights``: plan, prove, convert and compare weights from the command line.

Each command lives in its own module and imports what is heavy only when it runs.
"""

from __future__ import annotations

import typer

from npr_megatron.cli.weights.convert import convert
from npr_megatron.cli.weights.diff import diff
from npr_megatron.cli.weights.plan import plan
from npr_megatron.cli.weights.simulate import simulate
from npr_megatron.cli.weights.verify import verify

weights = typer.Typer(
    name="weights",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Plan, prove, convert and compare weights.\n\n"
    "Start here:  [bold]npr weights plan qwen3-4b[/bold]",
)
weights.command()(plan)
weights.command()(simulate)
weights.command()(convert)
weights.command()(diff)
weights.command()(verify)
