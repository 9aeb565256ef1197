"""Arguments that choose an engine, for every command that runs one."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

_ENGINE = "Engine"


class Backend(StrEnum):
    """Who computes."""

    EMBEDDED = "embedded"
    SGLANG = "sglang"


BackendOption = Annotated[
    Backend,
    typer.Option(
        "--backend",
        help="embedded: this package, on CPU or GPU. sglang: SGLang, where it is installed.",
        rich_help_panel=_ENGINE,
    ),
]
TpSize = Annotated[
    int,
    typer.Option(
        min=1,
        help="Devices that share one SGLang engine; the embedded one is cut by torchrun.",
        rich_help_panel=_ENGINE,
    ),
]
DpSize = Annotated[
    int,
    typer.Option(
        min=1,
        help="Copies of the model in one SGLang engine, each on --tp-size devices.",
        rich_help_panel=_ENGINE,
    ),
]
