"""``npr weights verify``: read a checkpoint to its last byte and name everything that is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from npr_megatron.cli.interrupt import interruptible
from npr_megatron.cli.weights.convert import HfFolder
from npr_megatron.cli.weights.progress import progress_bar


def verify(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="HF folder, torch_dist checkpoint, or version.")
    ],
    hf: HfFolder = None,
) -> None:
    """Check names, shapes, dtypes, completeness, checksums and every value of a checkpoint.

    Prints the digest of the weights, which is the same in every layout and format. Exit code 2 when
    something is wrong, with a line for each problem.

    Examples:

      npr weights verify models/Qwen3-4B

      npr weights verify checkpoints/step-00000012 --hf models/Qwen3-4B
    """
    from npr_megatron.weights.checkpoints.inspection import inspect_checkpoint

    with interruptible("nothing was changed"), progress_bar(str(path)) as report:
        finding = inspect_checkpoint(path, hf, report)
    for problem in finding.problems:
        print(f"error: {problem}", file=sys.stderr)
    if finding.problems:
        count = len(finding.problems)
        print(f"{count} problem{'s' if count > 1 else ''} found", file=sys.stderr)
        raise typer.Exit(2)
    dtypes = ", ".join(name.removeprefix("torch.") for name in finding.dtypes)
    print(f"{path}: {finding.num_tensors} tensors, {finding.num_bytes} bytes, {dtypes}, no problem")
    print(f"digest {finding.digest:#018x}")
