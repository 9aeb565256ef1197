"""Arguments of ``npr generate``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from npr_megatron.records.request import RefusalPolicy
from npr_megatron.records.trajectory import DecodeMode

_SAMPLING, _LIMITS, _ENGINE = "Sampling", "Limits", "Engine"


class Dtype(StrEnum):
    """What the engine computes in."""

    FP32 = "fp32"
    BF16 = "bf16"


class Weights(StrEnum):
    """How the matrices are kept."""

    AS_TRAINED = "as_trained"
    FP8 = "fp8"


ModelFolder = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="HF folder, such as RUN_DIR/stages/npr/hf.")
]
Prompts = Annotated[
    list[str] | None,
    typer.Argument(metavar="[PROMPT]...", help="Questions; - reads them from standard input."),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(help='Read prompts from here too: one per line, or JSONL with "question".'),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Append each answer to this JSONL file as it ends. Answers that are there already are "
        "not decoded again, so the same command goes on where it was stopped.",
    ),
]
Mode = Annotated[DecodeMode, typer.Option(help="Decode branches at once, or plain text.")]
Samples = Annotated[int, typer.Option(min=1, help="Answers per prompt; they share its memory.")]
OnRefusal = Annotated[
    RefusalPolicy,
    typer.Option(help="When a fork breaks the schema or has no room: go on as plain text, or end."),
]
Temperature = Annotated[
    float,
    typer.Option(min=0.0, help="0 takes the likeliest token.", rich_help_panel=_SAMPLING),
]
TopP = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="Likeliest tokens up to this mass.", rich_help_panel=_SAMPLING
    ),
]
TopK = Annotated[
    int,
    typer.Option(min=0, help="So many of the likeliest; 0 keeps all.", rich_help_panel=_SAMPLING),
]
MinP = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Tokens at least so likely, as a share of the likeliest.",
        rich_help_panel=_SAMPLING,
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option(
        min=0.01, help="Above 1: what was said becomes less likely.", rich_help_panel=_SAMPLING
    ),
]
StepRepetitionPenalty = Annotated[
    float,
    typer.Option(
        min=0.01,
        help="The same inside a branch, over that branch only; the paper's engine has 1.02.",
        rich_help_panel=_SAMPLING,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Key of the draws.", rich_help_panel=_SAMPLING)]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens per answer, over all branches. Default: half of the model's positions, at "
        "most 8192.",
        rich_help_panel=_LIMITS,
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        min=0.001,
        metavar="SECONDS",
        help="End an answer after so long; what it says by then is kept.",
        rich_help_panel=_LIMITS,
    ),
]
MaxRunning = Annotated[
    int, typer.Option(min=1, help="Answers decoded at once.", rich_help_panel=_LIMITS)
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="cpu|cuda", help="Default: cuda if there is one.", rich_help_panel=_ENGINE
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype", help="Default: bf16 on cuda, fp32 on the cpu.", rich_help_panel=_ENGINE
    ),
]
WeightsOption = Annotated[
    Weights,
    typer.Option(
        "--weights",
        help="fp8 keeps the matrices of the layers in 8 bits, in blocks of 128.",
        rich_help_panel=_ENGINE,
    ),
]
