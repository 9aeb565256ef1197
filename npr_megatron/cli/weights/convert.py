"""``npr weights convert``: HF safetensors to Megatron ``torch_dist`` and back."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from npr_megatron.cli.interrupt import interruptible
from npr_megatron.cli.weights.progress import progress_bar
from npr_megatron.errors import InputError

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6}
_UNITS |= {"GB": 10**9, "TiB": 1 << 40, "TB": 10**12}


class Dtype(StrEnum):
    """What weights can be cast to."""

    BF16 = "bf16"
    FP32 = "fp32"


HfFolder = Annotated[
    Path | None,
    typer.Option(
        "--hf",
        metavar="HF_FOLDER",
        help="config.json and tokenizer of a torch_dist checkpoint that carries none.",
    ),
]


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="HF folder, or torch_dist checkpoint.")
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Written; must not be.")],
    tp: Annotated[int, typer.Option(min=1, help="Cut chunks for this tensor parallelism.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="The same for pipeline parallelism.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="The same for expert parallelism.")] = 1,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Most weights in memory at a time: 512MiB, 4GiB.")
    ] = "4GiB",
    dtype: Annotated[Dtype | None, typer.Option(help="Cast; default: as it is.")] = None,
    hf: HfFolder = None,
) -> None:
    """Convert a checkpoint to the other format: HF safetensors <-> Megatron torch_dist.

    Any Megatron layout can load any torch_dist target; --tp, --pp and --ep make each of its ranks
    read whole chunks. config.json and the tokenizer travel along. The same command again continues
    an interrupted conversion; TARGET appears when it is complete.

    Examples:

      npr weights convert models/Qwen3-4B megatron/Qwen3-4B --tp 2 --pp 2

      npr weights convert megatron/Qwen3-4B models/back --memory 1GiB

      npr weights convert checkpoints/step-00000012 models/trained --hf models/Qwen3-4B
    """
    from npr_megatron.weights.checkpoints.chunking import ReaderShape
    from npr_megatron.weights.checkpoints.conversion import Conversion, Request

    conversion = Conversion(
        Request(
            source=source,
            target=target,
            reader_shape=ReaderShape(tp, pp, ep),
            memory_bytes=parse_size(memory),
            dtype=None if dtype is None else dtype.value,
            hf_folder=hf,
        )
    )
    with interruptible("the same command continues here"), progress_bar(str(target)) as report:
        conversion.run(report)
    print(f"{target}: {conversion.num_bytes} bytes of weights")


def parse_size(text: str) -> int:
    """Return the bytes that ``text`` says, such as ``4GiB`` or ``500 MB``.

    Raises:
        InputError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): value for unit, value in _UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise InputError(f"--memory {text!r} is no size; write 512MiB or 4GiB")
    return int(float(found[1]) * units[found[2].lower()])
