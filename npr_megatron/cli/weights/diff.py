"""``npr weights diff``: where two models differ, parameter by parameter."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npr_megatron.cli.interrupt import interruptible
from npr_megatron.cli.options import Json
from npr_megatron.cli.weights.convert import HfFolder
from npr_megatron.cli.weights.progress import progress_bar

if TYPE_CHECKING:
    from npr_megatron.weights.checkpoints.comparison import Comparison


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="HF folder, or torch_dist checkpoint.")],
    b: Annotated[
        Path, typer.Argument(metavar="B", help="The same, or the folder of a living run.")
    ],
    hf: HfFolder = None,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints, of any format and layout, or a checkpoint with a living run.

    Lists the parameters that differ, in the order of the forward pass. Exit code 0 when all are
    equal, 1 when not, 2 when one side cannot be read.

    Examples:

      npr weights diff models/Qwen3-4B megatron/Qwen3-4B

      npr weights diff models/Qwen3-4B-tags runs/quickstart-seed0
    """
    from npr_megatron.weights.checkpoints.comparison import State, compare, open_side, total_digests

    with interruptible("nothing was changed"):
        side_a, side_b = (open_side(path, hf) for path in (a, b))
        with progress_bar(f"{a} {b}") as report:
            found = compare(side_a, side_b, report)
    differing = [comparison for comparison in found if comparison.state is not State.EQUAL]
    digests = total_digests(found)
    if as_json:
        print(json.dumps(_as_json(found, digests), indent=2))
    else:
        _print_table(differing, len(found), digests)
    if differing:
        raise typer.Exit(1)


def _as_json(found: Sequence[Comparison], digests: tuple[int | None, int | None]) -> dict[str, Any]:
    return {
        "equal": all(comparison.state == "equal" for comparison in found),
        "digest_a": _hex(digests[0]),
        "digest_b": _hex(digests[1]),
        "parameters": [
            {
                "parameter": comparison.parameter,
                "state": comparison.state,
                "digest_a": _hex(comparison.digest_a),
                "digest_b": _hex(comparison.digest_b),
                "max_delta": _number(comparison.max_delta),
                "first": comparison.first,
                "note": comparison.note,
            }
            for comparison in found
        ],
    }


def _number(value: float | None) -> float | str | None:
    """Return what JSON can say: it has no infinity and no nan."""
    return value if value is None or math.isfinite(value) else str(value)


def _hex(digest: int | None) -> str | None:
    return None if digest is None else f"{digest:#018x}"


def _print_table(
    differing: Sequence[Comparison], count: int, digests: tuple[int | None, int | None]
) -> None:
    from rich.console import Console
    from rich.table import Table

    if differing:
        table = Table()
        for column in ("parameter", "state", "first at", "max |delta|", "note"):
            table.add_column(column, no_wrap=column == "parameter")
        for comparison in differing:
            first = "" if comparison.first is None else str(list(comparison.first))
            delta = "" if comparison.max_delta is None else f"{comparison.max_delta:.3g}"
            table.add_row(comparison.parameter, comparison.state, first, delta, comparison.note)
        Console().print(table)
    equal = count - len(differing)
    print(f"{equal} of {count} parameters are equal")
    for name, digest in zip("AB", digests, strict=True):
        print(f"digest {name} {_hex(digest) or 'unknown'}")
