"""Arguments of ``npr serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_LIMITS = "Limits"


Model = Annotated[
    Path,
    typer.Option("--model", metavar="MODEL_DIR", help="HF folder, such as RUN_DIR/stages/npr/hf."),
]
Name = Annotated[
    str | None, typer.Option(help="What clients call the model. Default: MODEL_DIR as given.")
]
HostOption = Annotated[
    str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for other machines.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
MaxRunning = Annotated[
    int, typer.Option(min=1, help="Answers decoded at once.", rich_help_panel=_LIMITS)
]
MaxWaiting = Annotated[
    int,
    typer.Option(
        min=0,
        help="Answers that may wait beyond those; further requests are told to come back (429).",
        rich_help_panel=_LIMITS,
    ),
]
KvSlots = Annotated[
    int,
    typer.Option(
        min=1,
        help="Tokens whose keys and values fit; bounds prompt and answer.",
        rich_help_panel=_LIMITS,
    ),
]
DrainSeconds = Annotated[
    float,
    typer.Option(
        min=0.0,
        metavar="SECONDS",
        help="How long answers under way may go on after Ctrl-C or SIGTERM.",
        rich_help_panel=_LIMITS,
    ),
]
