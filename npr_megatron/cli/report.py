"""``npr report``: the stage table and the page of a run, finished or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from npr_megatron.cli.options import Json


def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A folder under runs/.")],
    as_json: Json = False,
) -> None:
    """Print the stage table of a run and write its page, also while it is running.

    Example:

      npr report runs/quickstart-seed0
    """
    from rich.console import Console

    from npr_megatron.report.page import read_config, read_optional_lines, write_page
    from npr_megatron.report.table import stage_rows, stage_table

    read_config(run_folder)
    evaluations = read_optional_lines(run_folder / "evaluations.jsonl")
    page = write_page(run_folder)
    if as_json:
        print(json.dumps({"report": str(page), "evaluations": stage_rows(evaluations)}))
        return
    Console().print(stage_table(evaluations))
    print(page)
