"""``npr weights plan``: what a push would move, and how long it would take. No GPU, no weights."""

from __future__ import annotations

from typing import Annotated

import typer

from npr_megatron.planning.models import model_of


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A known model or an HF folder (config.json).")
    ],
) -> None:
    """Say what a push of weights moves where, and how long it takes on a described cluster.

    Example:

      npr weights plan qwen3-235b-a22b
    """
    print(model_of(model).model_dump_json(indent=2))
