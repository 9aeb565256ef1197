"""Train one model in bf16 and in FP8 on a GPU: losses, speed-up, and share of the device's peak.

One process and one rank. Every recipe starts from the same random weights and learns the same
rows, each filled by one trajectory with branches; the first two steps, in which kernels are
compiled, are not timed. Recipes that this machine cannot run are left out, and why is said.
Shares of the peak count what a step must compute (``planning.flops``), against the bf16 peak for
FP8 too.

    bash tools/setup_te && python tools/bench_train_device.py
    python tools/bench_train_device.py --rows 8192 --recipes bf16 tensorwise --steps 50 --json
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from bench_figures import Figure, table_of
from bench_train_rows import Workload
from rich.console import Console

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.parallel_check import parallel_problems
from npr_megatron.config.training import OptimizerConfig, ParallelConfig, TrainerConfig
from npr_megatron.errors import NprError
from npr_megatron.planning.flops import peak_tflops, training_flops
from npr_megatron.planning.models import KNOWN_MODELS, model_of
from npr_megatron.runtime.device import device_type
from npr_megatron.runtime.foreign_warnings import silence_foreign_warnings
from npr_megatron.runtime.fused_kernels import require_fp8
from npr_megatron.runtime.process_group import RankInfo
from npr_megatron.topology.pairs import num_visible_pairs
from npr_megatron.train.rank import TrainerRank
from npr_megatron.train.step import StepBatch

RECIPES = ("bf16", "delayed", "tensorwise", "blockwise", "mxfp8")
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, warmup_steps=2, decay="constant")
TINY = KNOWN_MODELS["qwen3-0.6b"].model_copy(
    update={"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
)
_UNTIMED = 2


@dataclass(frozen=True, slots=True)
class Curve:
    """One run: its losses, and the seconds of a step."""

    losses: list[float]
    step_s: float


def main() -> None:
    """Measure what is asked for, print one table or one JSON list."""
    asked = _arguments()
    silence_foreign_warnings()
    model = TINY if asked.quick else model_of(asked.model)
    figures = [f for tokens in asked.rows for f in row_figures(model, tokens, asked)]
    if asked.json:
        print(json.dumps([{**asdict(f), "verdict": f.verdict} for f in figures], indent=1))
    else:
        Console().print(table_of("Trainer on a GPU", figures))


def row_figures(model: ModelConfig, tokens: int, asked: argparse.Namespace) -> list[Figure]:
    """Train by each recipe on rows of ``tokens``; compare with bf16, which comes first."""
    batch = Workload(
        name=f"rows of {tokens}",
        lengths=(tokens,) * asked.microbatches,
        row_tokens=tokens,
        rows_per_microbatch=1,
    ).batch(model.vocab_size)
    curves: dict[str, Curve] = {}
    figures: list[Figure] = []
    for recipe in RECIPES:
        if recipe not in asked.recipes:
            continue
        trainer = TrainerConfig(
            dtype="bf16",
            fp8=None if recipe == "bf16" else recipe,
            row_tokens=tokens,
            rows_per_microbatch=1,
            recompute=asked.recompute,
        )
        if problem := _problem(model, trainer):
            print(f"{recipe} is left out: {problem}", file=sys.stderr)
            continue
        curves[recipe] = train(model, trainer, batch, asked.steps)
        figures += _figures(recipe, curves, model, batch, tokens)
    return figures


def _problem(model: ModelConfig, trainer: TrainerConfig) -> str:
    problems = parallel_problems(ParallelConfig(), trainer, model)
    try:
        require_fp8(trainer.fp8)
    except NprError as error:
        problems.append(str(error))
    return "; ".join(problems)


def train(model: ModelConfig, trainer: TrainerConfig, batch: StepBatch, num_steps: int) -> Curve:
    """Take ``num_steps`` steps on ``batch`` from random weights."""
    losses: list[float] = []
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        rank = TrainerRank(
            RankInfo(rank=0, world_size=1, init_method=f"file://{folder}/rendezvous"),
            model=model,
            parallel=ParallelConfig(),
            trainer=trainer,
            run_id="bench",
            arena_dir=folder,
        )
        _draw(rank)
        rank.begin_stage(OPTIMIZER, num_steps)
        for _ in range(num_steps):
            started = _now()
            losses.append(rank.train_step(batch).loss)
            seconds.append(_now() - started)
        rank.close()
    del rank
    gc.collect()
    torch.cuda.empty_cache()
    return Curve(losses, statistics.median(seconds[_UNTIMED:] or seconds))


def _draw(rank: TrainerRank) -> None:
    """Fill the weights where they are; each recipe gets the same ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in rank.storages.values():
            if weight.ndim == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(std=0.02)


def _now() -> float:
    if device_type() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _figures(
    recipe: str, curves: dict[str, Curve], model: ModelConfig, batch: StepBatch, tokens: int
) -> list[Figure]:
    curve, where = curves[recipe], f"{recipe}, rows of {tokens}"
    losses = " ".join(f"{loss:.4f}" for loss in curve.losses)
    figures = [Figure(f"tokens/s, {where}", batch.num_tokens / curve.step_s, detail=losses)]
    peak = peak_tflops(torch.cuda.get_device_name()) if device_type() == "cuda" else None
    if peak is not None:
        pairs = sum(_num_pairs(batch))
        share = training_flops(model, batch.num_tokens, pairs) / curve.step_s / (peak * 1e12)
        figures.append(Figure(f"share of the bf16 peak, {where}", 100 * share, "%"))
    plain = curves.get("bf16")
    if plain is not None and recipe != "bf16":
        speed_up = plain.step_s / curve.step_s
        figures.append(Figure(f"{recipe} / bf16, rows of {tokens}", speed_up, "x"))
        apart = max(abs(a / b - 1) for a, b in zip(curve.losses, plain.losses, strict=True))
        figures.append(Figure(f"loss apart from bf16, {where}", 100 * apart, "%", 2.0, True))
    return figures


def _num_pairs(batch: StepBatch) -> Sequence[int]:
    return [
        num_visible_pairs(microbatch.block[row], microbatch.branch[row])
        for microbatch in batch.microbatches
        for row in range(microbatch.shape[0])
    ]


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description="Train one model in bf16 and in FP8 on a GPU.")
    options.add_argument("--model", default="qwen3-4b", help="a known shape, or an HF folder")
    options.add_argument("--rows", type=int, nargs="+", default=[8192, 32_768], help="[tokens]")
    options.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--microbatches", type=int, default=1, help="rows of a step")
    options.add_argument("--recompute", choices=("none", "selective", "full"), default="full")
    options.add_argument("--quick", action="store_true", help="a tiny model, to see that all runs")
    options.add_argument("--json", action="store_true")
    return options.parse_args()


if __name__ == "__main__":
    main()
