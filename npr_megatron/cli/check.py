"""``npr check`` and ``npr schema``: judge and describe run files, on any machine, without torch."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from npr_megatron.cli.options import Json, Overrides, RunFile, load_checked
from npr_megatron.config.run import RunConfig
from npr_megatron.config.sft import SftConfig


def check(run_file: RunFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Find every problem of a run file without starting anything.

    Needs neither torch nor a GPU, so a login node can do it. Exit code 2 when there is a problem.

    Examples:

      npr check examples/quickstart/run.toml

      npr check run.toml parallel.tp_size=2 zero.num_steps=3

      npr check run.toml --json   (prints the resolved run)
    """
    config = load_checked(run_file, overrides or [])
    if as_json:
        print(config.model_dump_json(indent=2))
    else:
        print(f"{run_file}: no problem found")


def schema(
    sft: Annotated[bool, typer.Option("--sft", help="Of the run files of npr sft.")] = False,
) -> None:
    """Print the JSON Schema of run files, for editors that complete and check TOML.

    Examples:

      npr schema > run.schema.json

      npr schema --sft > sft.schema.json
    """
    section = SftConfig if sft else RunConfig
    print(json.dumps(section.model_json_schema(), indent=2))
