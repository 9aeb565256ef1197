"""Measure native branches on SGLang against what a client can make of SGLang as it is.

The same prompts, weights and lengths of branches in one run, each side in processes of its own that
are frozen while another one is measured. Rollouts are two blocks of two to five branches, eight of
each prompt. The model is tiny (4 layers, hidden 128, vocabulary 512, fp32, random), so that what
serving adds to it shows; with ``--device cuda`` it has the shape of Qwen3-4B in bf16, branches have
a thousand tokens, and all sides decode by CUDA graphs.

``stock``
    The baseline: unmodified SGLang, branches as requests, joined as plain text, which computes the
    keys and values of every branch but the first again. What it writes behind a join is not from
    the policy that is trained. Without log-probs: the least that it can be asked for.
``stock with log-probs``
    The same with the log-prob of every sampled token, as reinforcement learning needs them.
``npr``
    NPR Engine on SGLang: exact positions, joins by copies of keys and values, log-probs.
``embedded``
    NPR Engine in this package.

Every figure is given with its ratio to the baseline, measured in the same run: the sides take turns
and the best of ``--repeats`` turns counts. ``tokens/s`` counts the tokens of responses. A *join* is
from the last token of the last branch to the first one sampled behind it, for the caller.

    python tools/bench_sglang.py
    python tools/bench_sglang.py --repeats 9 --json
    python tools/bench_sglang.py --device cuda
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import torch
from bench_engine_models import FOUR_BILLION, TINY
from bench_engine_sglang import STOCK
from bench_processes import FrozenProcess
from bench_sglang_rollouts import Report, Rollout, rollouts
from rich.console import Console
from rich.table import Table

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import InitConfig, ModelConfig
from npr_megatron.weights.checkpoints.hf import random_init, write_hf

BASELINE = "stock"
SIDES: dict[str, tuple[str, dict[str, bool]]] = {
    BASELINE: ("stock", {"has_logprobs": False}),
    "stock with log-probs": ("stock", {"has_logprobs": True}),
    "npr": ("npr", {}),
    "embedded": ("embedded", {}),
}
"""Name of each side: its process, and what that is asked besides."""
_SEEDS = count()
"""Of the texts drawn so far: none is decoded twice by accident."""
_WORKER = Path(__file__).with_name("bench_sglang_worker.py")
_ENVIRONMENT = {"stock": STOCK, "npr": {}, "embedded": {}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is decoded."""

    in_flight: int = 16
    """Rollouts at once."""
    num_rollouts: int = 32
    prompt_tokens: int = 256
    branches: tuple[int, ...] = (2, 3, 4, 5)
    step_tokens: int = 32
    num_alone: int = 3
    """Rollouts one after another, for latency and joins."""
    join_tokens: tuple[int, ...] = (32, 256)
    """Tokens per branch of the blocks whose joins are timed."""
    num_kv_slots: int = 65_536


QUICK = Sizes(
    in_flight=2,
    num_rollouts=4,
    prompt_tokens=32,
    branches=(2, 3),
    step_tokens=8,
    num_alone=1,
    join_tokens=(8,),
    num_kv_slots=8192,
)
"""Enough to see that everything runs; the figures mean nothing."""
ON_CUDA = Sizes(
    in_flight=16,
    num_rollouts=32,
    prompt_tokens=512,
    step_tokens=1000,
    num_alone=2,
    join_tokens=(250, 1000, 2000),
    num_kv_slots=200_000,
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One cell of the table."""

    measure: str
    side: str
    value: float
    unit: str
    ratio: float
    """To the baseline."""


def main() -> None:
    """Measure, print one table or one JSON list."""
    asked = _arguments()
    if find_spec("sglang") is None:
        raise SystemExit("SGLang is not installed; install it with: bash tools/setup_sglang")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        is_large = asked.device == "cuda" and not asked.quick
        sizes = QUICK if asked.quick else ON_CUDA if is_large else Sizes()
        model = FOUR_BILLION if is_large else TINY
        workers = _start(model, sizes, asked.device, folder, stack)
        figures = [*_figures(workers, sizes, asked.repeats)]
    if asked.json:
        print(json.dumps([asdict(figure) for figure in figures], indent=1))
    else:
        Console().print(_table(figures))


def _start(
    model: ModelConfig, sizes: Sizes, device: str, folder: str, stack: ExitStack
) -> dict[str, FrozenProcess]:
    """Return a process of each kind, ready and frozen, all with the same weights."""
    dtype = "bf16" if device == "cuda" else "fp32"
    tensor_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    weights = random_init(model, InitConfig(), 0)
    write_hf(folder, model, {name: tensor.to(tensor_dtype) for name, tensor in weights.items()})
    config = EngineConfig(
        dtype=dtype,
        num_kv_slots=sizes.num_kv_slots,
        max_running=sizes.in_flight,
        max_streams=max(sizes.branches) * sizes.in_flight,
    )
    settings = {
        "model": model.model_dump(mode="json"),
        "config": config.model_dump(mode="json"),
        "device": device,
        "folder": folder,
    }
    workers: dict[str, FrozenProcess] = {}
    for kind, environment in _ENVIRONMENT.items():
        worker = FrozenProcess(_WORKER, [json.dumps({"side": kind, **settings})], environment)
        workers[kind] = stack.enter_context(worker)
    for worker in workers.values():
        worker.wait()
    return workers


def _figures(workers: dict[str, FrozenProcess], sizes: Sizes, repeats: int) -> Iterator[Figure]:
    def turns(
        num_rollouts: int, step_tokens: int, in_flight: int, is_watched: bool
    ) -> dict[str, _Turn]:
        def draw() -> list[Rollout]:
            return rollouts(
                num_rollouts, sizes.prompt_tokens, sizes.branches, step_tokens, next(_SEEDS)
            )

        return _in_turns(workers, draw, in_flight, is_watched, repeats)

    loaded = turns(sizes.num_rollouts, sizes.step_tokens, sizes.in_flight, False)
    at = f"{sizes.in_flight} in flight"
    yield from _compared(f"tokens/s, {at}", "", loaded, lambda turn: turn.tokens / turn.seconds)
    yield from _compared(f"prefix hits, {at}", "%", loaded, _hits)
    yield from _compared(
        f"computed per token, {at}", "", loaded, lambda turn: turn.num_computed / turn.tokens
    )
    alone = turns(sizes.num_alone, sizes.step_tokens, 1, False)
    yield from _compared("latency alone", "ms", alone, lambda turn: _median_ms(turn.latencies_s))
    for step_tokens in sizes.join_tokens:
        joined = turns(sizes.num_alone, step_tokens, 1, True)
        name = f"join, {step_tokens} tokens per branch"
        yield from _compared(name, "ms", joined, lambda turn: _median_ms(turn.joins_s))


def _hits(turn: _Turn) -> float:
    return 100 * turn.num_cached / turn.num_known


def _median_ms(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds)


@dataclass(kw_only=True)
class _Turn(Report):
    """A report of rollouts whose responses have ``tokens`` tokens."""

    tokens: int


def _in_turns(
    workers: dict[str, FrozenProcess],
    draw: Callable[[], list[Rollout]],
    in_flight: int,
    is_watched: bool,
    repeats: int,
) -> dict[str, _Turn]:
    """Return the best turn of each side, after one of each to warm up."""
    turns: dict[str, list[_Turn]] = {side: [] for side in SIDES}
    for number in range(repeats + 1):
        wanted = draw()
        tokens = sum(len(rollout.response) for rollout in wanted)
        asked = {
            "rollouts": [(rollout.prompt, rollout.response) for rollout in wanted],
            "in_flight": in_flight,
            "is_watched": is_watched,
        }
        for side, (kind, options) in SIDES.items():
            report = workers[kind].ask(asked | options)
            if number:
                turns[side].append(_Turn(**report, tokens=tokens))
    return {side: min(own, key=lambda turn: turn.seconds) for side, own in turns.items()}


def _compared(
    measure: str, unit: str, turns: dict[str, _Turn], value: Callable[[_Turn], float]
) -> Iterator[Figure]:
    baseline = value(turns[BASELINE])
    for side, turn in turns.items():
        yield Figure(measure, side, value(turn), unit, value(turn) / baseline)


def _table(figures: Sequence[Figure]) -> Table:
    """Return one row per measure and one column per side."""
    table = Table(title=f"Native branches on SGLang; x: to {BASELINE}")
    table.add_column("measure")
    for side in SIDES:
        table.add_column(side, justify="right")
    rows: dict[str, list[str]] = {}
    for figure in figures:
        cell = f"{figure.value:.4g} {figure.unit}".rstrip()
        if figure.side != BASELINE:
            cell += f"  x{figure.ratio:.2f}"
        rows.setdefault(figure.measure, []).append(cell)
    for measure, cells in rows.items():
        table.add_row(measure, *cells)
    return table


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description="Measure native branches on SGLang.")
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--repeats", type=int, default=3, help="turns of each side, best kept")
    options.add_argument("--quick", action="store_true", help="tiny sizes, to see that all runs")
    options.add_argument("--json", action="store_true")
    return options.parse_args()


if __name__ == "__main__":
    main()
