"""Measure NPR Engine: each promise as a ratio of two measurements of one run, with its bar.

What is compared runs in turns on one thread and is taken by CPU time; SGLang has processes of its
own, of which the one that computes counts. A ratio survives a busy machine, absolute times do not.
The model is tiny (4 layers, hidden 128, vocabulary 512, fp32, random), so that what an engine adds
to it shows.

``parallel``
    Native parallel decoding of a response against decoding the same tokens one after another, at
    batch 1, as a share of the ideal (all tokens / critical path). Of a model whose weights do not
    fit the caches, so that a step waits for them, as with every model of use.
``hf``, ``sglang``
    Useful tokens per second, eight times as many requests as trajectories in flight, all waiting at
    the start. Against HF: rollouts as a trainer asks for them, eight of each prompt of 256 tokens,
    two blocks of two to five branches, which the engine decodes in parallel and HF one token after
    another. Against both: sequential sampling at temperature 1 without filters, prompts of 16 to 96
    tokens, responses of 16 to 128. The engine and SGLang batch continuously. HF ``generate``
    decodes static batches in order of arrival, padded on the left, each until its longest response
    ends, with the better of its two caches; the tokens it computes beyond a response's end are not
    counted. The engine records the log-prob of every token, the others none.
``group``
    16 rollouts of one prompt against one rollout each of 16 prompts of the same length.
``overhead``
    The share of a step that is not forward pass and logits.
``history``
    How the cost of a token changes with the number of requests that an engine has finished.
``device``
    A model of the shape of Qwen3-4B in bf16: steps against reading its weights once, and a response
    of five long branches against decoding it one token after another. What ``--device cuda`` runs.

    python tools/bench_engine.py
    python tools/bench_engine.py --only parallel group --repeats 9
    python tools/bench_engine.py --device cuda --json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from bench_engine_costs import group_figures, history_figure, overhead_figure
from bench_engine_device import floor_figures
from bench_engine_models import BEYOND_CACHES, FOUR_BILLION, TINY, Subject
from bench_engine_parallel import five_branch_figure, parallel_figures
from bench_engine_throughput import hf_figures, sglang_figures
from bench_engine_workload import Workload
from bench_figures import Figure, table_of
from rich.console import Console

_GIBIBYTE = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is decoded for a figure."""

    batches: tuple[int, ...] = (1, 8, 32)
    branches: tuple[int, ...] = (2, 3, 4, 5)
    step_tokens: int = 32
    """Tokens of text per branch, give or take an eighth."""
    longest: int = 128
    """Tokens of the longest response of the throughput figures."""
    group_prompt: int = 512
    group_responses: tuple[int, ...] = (64, 256)
    history: tuple[int, int, int, int] = (100, 1800, 200, 20)
    """Requests: finished by the young engine, by the old one, then served by each, per turn."""
    device_batches: tuple[int, ...] = (1, 64)
    device_steps: int = 64
    device_step_tokens: int = 1000
    copied_bytes: int = 4 * _GIBIBYTE


QUICK = Sizes(
    batches=(2,),
    branches=(2,),
    step_tokens=8,
    longest=16,
    group_prompt=64,
    group_responses=(8,),
    history=(4, 8, 8, 4),
    device_batches=(2,),
    device_steps=4,
    device_step_tokens=8,
    copied_bytes=2**20,
)
"""Enough to see that everything runs; the figures mean nothing."""


def main() -> None:
    """Measure what is asked for, print one table or one JSON list."""
    asked = _arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        figures = _measured(asked, Path(folder))
    if asked.json:
        rows = [{**asdict(figure), "verdict": figure.verdict} for figure in figures]
        print(json.dumps(rows, indent=1))
    else:
        Console().print(table_of("NPR Engine", figures))


def _measured(asked: argparse.Namespace, folder: Path) -> list[Figure]:
    sizes, repeats = QUICK if asked.quick else Sizes(), asked.repeats
    tiny = Subject.random(TINY, asked.device)
    tiny.write(folder)
    mixed = Workload.spread(4 * sizes.batches[-1], sizes.longest)
    large = Subject.random(TINY if asked.quick else BEYOND_CACHES, asked.device)
    sections: dict[str, Callable[[], list[Figure]]] = {
        "parallel": lambda: parallel_figures(large, sizes.branches, sizes.step_tokens, repeats),
        "hf": lambda: hf_figures(tiny, folder, sizes.batches, sizes.longest, repeats),
        "sglang": lambda: sglang_figures(tiny, folder, sizes.batches, sizes.longest, repeats),
        "group": lambda: group_figures(tiny, sizes.group_prompt, sizes.group_responses, repeats),
        "overhead": lambda: [overhead_figure(tiny, mixed, sizes.batches[-1], repeats)],
        "history": lambda: [history_figure(tiny, *sizes.history)],
        "device": lambda: _device_figures(asked, sizes),
    }
    if "sglang" in asked.only and find_spec("sglang") is None:
        print(
            "The figures against SGLang are left out: it is not installed; "
            "install it with: bash tools/setup_sglang",
            file=sys.stderr,
        )
        del sections["sglang"]
    return [figure for name, run in sections.items() if name in asked.only for figure in run()]


def _device_figures(asked: argparse.Namespace, sizes: Sizes) -> list[Figure]:
    subject = Subject(TINY if asked.quick else FOUR_BILLION, torch.device(asked.device), "bf16")
    return [
        *floor_figures(
            subject, sizes.device_batches, sizes.device_steps, sizes.copied_bytes, asked.repeats
        ),
        five_branch_figure(subject, sizes.device_step_tokens, asked.repeats),
    ]


def _arguments() -> argparse.Namespace:
    on_cpu = ("parallel", "hf", "sglang", "group", "overhead", "history")
    sections = (*on_cpu, "device")
    options = argparse.ArgumentParser(description="Measure NPR Engine.")
    options.add_argument("--device", default="cpu")
    options.add_argument(
        "--only", nargs="+", choices=sections, metavar="SECTION", help=f"of {', '.join(sections)}"
    )
    options.add_argument("--repeats", type=int, default=5, help="of each measurement, best kept")
    options.add_argument("--quick", action="store_true", help="tiny sizes, to see that all runs")
    options.add_argument("--json", action="store_true")
    asked = options.parse_args()
    asked.only = asked.only or (on_cpu if asked.device == "cpu" else ("device",))
    return asked


if __name__ == "__main__":
    main()
