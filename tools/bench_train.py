"""Measure the trainer: each promise as a ratio of two measurements of one run, with its bar.

What is compared runs in turns on one thread and is taken by CPU time, the best of ``--repeats``; a
ratio survives a busy machine, absolute times do not.

``step``
    Tokens per second of optimizer steps: a real trainer rank (Megatron's schedule, gradient
    buffers and distributed optimizer, one process) against HF Transformers' Qwen3ForCausalLM
    trained by plain PyTorch under an explicit mask with explicit positions, SDPA and fused AdamW.
    Same weights, same packed rows; both must find the same losses.
``attention``
    One layer of branch attention, forward and backward, for one trajectory that fills the row: by
    segments against SDPA under a dense mask, time and peak memory, what says who sees whom
    included. Where the mask would take too long (``--dense`` says up to how many tokens), memory
    is held against the bytes of the mask alone. With ``--device cuda`` segments are timed against
    FlexAttention too.
``packing``
    Tokens that are not padding, of lengths as reasoning data has them.
``logprobs``
    Peak memory of label log-probs from hidden states, forward and backward, beside inputs and
    their gradients, against logits, ``float()`` and ``log_softmax``.

Found on two busy cores, one thread: steps 1.09 times as fast as plain PyTorch in rows of 256 and
1.6 times in rows of 2,048; attention 2.7 and 3.4 times as fast as under a mask at 2,048 and 8,192
tokens, in 7 and 33 MiB instead of 34 and 384, and in 146 MiB at 32,768 tokens, where the mask alone
is 4,096; 98.7 % of rows filled at least; log-probs in 88 of 759 MiB.

    python tools/bench_train.py
    python tools/bench_train.py --only attention --dense 32768 --repeats 1
    python tools/bench_train.py --device cuda --only attention logprobs --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from bench_figures import Figure, table_of
from bench_train_rows import Workload, reasoning_lengths
from rich.console import Console

from npr_megatron.config.model import ModelConfig
from npr_megatron.data.row_plan import plan_epoch
from npr_megatron.runtime.device import install_cuda_stand_in
from npr_megatron.runtime.foreign_warnings import silence_foreign_warnings

SECTIONS = ("step", "attention", "packing", "logprobs")
MODEL = ModelConfig(
    num_hidden_layers=4,
    hidden_size=256,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    intermediate_size=768,
    vocab_size=4096,
    tie_word_embeddings=False,
)
"""The model of ``step``: small, so that what a trainer adds to it shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is computed for a figure."""

    workloads: tuple[Workload, ...]
    attention: tuple[int, ...] = (2048, 8192, 32_768)
    heads: tuple[int, int, int] = (2, 1, 32)
    """Query heads, key heads, and channels of each."""
    rows: tuple[int, ...] = (8192, 32_768)
    num_samples: int = 6000
    logprobs: tuple[int, int, int] = (2048, 32_768, 64)
    """Tokens, vocabulary, hidden size."""


FULL = Sizes(
    workloads=(
        Workload(
            name="32 short answers, rows of 256",
            lengths=(60, 80, 100, 120) * 8,
            row_tokens=256,
            rows_per_microbatch=4,
        ),
        Workload(
            name="4 trajectories, rows of 2048",
            lengths=(600, 900, 1100, 1400),
            row_tokens=2048,
            rows_per_microbatch=1,
        ),
    ),
)
QUICK = Sizes(
    workloads=(Workload(name="quick", lengths=(20, 30, 40), row_tokens=64, rows_per_microbatch=1),),
    attention=(256, 1024),
    rows=(8192,),
    num_samples=300,
    logprobs=(512, 4096, 16),
)
"""Enough to see that everything runs; the figures mean nothing."""


def main() -> None:
    """Measure what is asked for, print one table or one JSON list."""
    asked = _arguments()
    torch.set_num_threads(1)
    silence_foreign_warnings()
    install_cuda_stand_in()
    figures = _measured(asked)
    if asked.json:
        rows = [{**asdict(figure), "verdict": figure.verdict} for figure in figures]
        print(json.dumps(rows, indent=1))
    else:
        Console().print(table_of("Trainer", figures))


def _measured(asked: argparse.Namespace) -> list[Figure]:
    # They import Megatron, which warns of what is missing where nothing is to be done about it.
    from bench_train_attention import attention_figures
    from bench_train_memory import logprob_figures
    from bench_train_step import step_figures

    sizes, repeats = QUICK if asked.quick else FULL, asked.repeats
    device = torch.device(asked.device)
    sections: dict[str, Callable[[], list[Figure]]] = {
        "step": lambda: step_figures(MODEL, sizes.workloads, repeats),
        "attention": lambda: attention_figures(
            sizes.attention, asked.dense, sizes.heads, repeats, device
        ),
        "packing": lambda: packing_figures(sizes),
        "logprobs": lambda: logprob_figures(*sizes.logprobs, repeats, device),
    }
    return [figure for name, run in sections.items() if name in asked.only for figure in run()]


def packing_figures(sizes: Sizes) -> list[Figure]:
    """Tokens of an epoch / cells of its rows."""
    figures: list[Figure] = []
    for row_tokens in sizes.rows:
        for kind in ("answers", "turns", "mix", "limit"):
            lengths = reasoning_lengths(kind, row_tokens, sizes.num_samples)
            num_rows = len(plan_epoch(lengths, row_tokens, seed=0, epoch=0))
            filled = 100 * int(lengths.sum()) / (num_rows * row_tokens)
            detail = f"{len(lengths)} trajectories in {num_rows} rows"
            figures.append(
                Figure(f"rows of {row_tokens} filled, {kind}", filled, "%", 95.0, False, detail)
            )
    return figures


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description="Measure the trainer.")
    options.add_argument("--device", default="cpu", help="of attention and logprobs")
    options.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        metavar="SECTION",
        default=SECTIONS,
        help=f"of {', '.join(SECTIONS)}",
    )
    options.add_argument(
        "--dense", type=int, default=8192, help="longest row that gets a dense mask [tokens]"
    )
    options.add_argument("--repeats", type=int, default=5, help="of each measurement, best kept")
    options.add_argument("--quick", action="store_true", help="tiny sizes, to see that all runs")
    options.add_argument("--json", action="store_true")
    return options.parse_args()


if __name__ == "__main__":
    main()
