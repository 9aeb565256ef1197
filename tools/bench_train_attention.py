"""Branch attention at long context, for tools/bench_train.py: segments, dense mask, block mask."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from bench_figures import Clock, Figure, bests
from bench_train_memory import peak_bytes
from bench_train_rows import trajectory
from torch import Tensor

from npr_megatron.model.attention import (
    BranchContext,
    BranchCore,
    Visibility,
    block_mask,
    score_bias,
)
from npr_megatron.records.sample import TrainingSample
from npr_megatron.topology.attention_plan import AttentionPlan, attention_plan
from npr_megatron.topology.visibility import dense_mask

_MEBIBYTE = 2**20


class Row:
    """One trajectory that fills a row, and heads to attend with."""

    def __init__(self, length: int, heads: tuple[int, int, int], device: torch.device) -> None:
        """``heads``: query heads, key heads, channels of each."""
        num_queries, num_keys, head_dim = heads
        sample = trajectory(np.random.default_rng(length), length, vocab_size=100)
        self._sample: TrainingSample = sample
        self.length, self._device = length, device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._dtype = dtype
        generator = torch.Generator().manual_seed(0)
        self._heads = [
            torch.randn(length, 1, count, head_dim, generator=generator)
            .to(device, dtype)
            .requires_grad_()
            for count in (num_queries, num_keys, num_keys)
        ]
        self._cos = torch.ones(length, 1, 1, head_dim, dtype=dtype, device=device)
        self._sin = torch.zeros_like(self._cos)
        config: Any = SimpleNamespace(kv_channels=head_dim)
        self._core = BranchCore(config)

    def plan(self) -> AttentionPlan:
        """Return what attention by segments needs to know."""
        sample = self._sample
        streams = np.zeros((1, self.length), np.int32), sample.block[None], sample.branch[None]
        return attention_plan(*streams, ((0, self.length),))

    def bias(self) -> Tensor:
        """Return what attention under a dense mask needs to know."""
        return score_bias(dense_mask(*self._streams()), self._dtype)

    def blocks(self) -> Visibility:
        """Return what FlexAttention needs to know."""
        everything = torch.arange(self.length, device=self._device)
        return block_mask(*self._streams(), everything, everything)

    def run(self, visibility: Callable[[], Visibility]) -> None:
        """Say who sees whom, attend, and go back."""
        context = BranchContext(rotary_cos=self._cos, rotary_sin=self._sin, visibility=visibility())
        output = self._core(*self._heads, None, packed_seq_params=context)
        torch.autograd.grad(output, self._heads, torch.ones_like(output))

    def _streams(self) -> tuple[Tensor, Tensor, Tensor]:
        block, branch = (
            torch.from_numpy(stream[None]).to(self._device)
            for stream in (self._sample.block, self._sample.branch)
        )
        return torch.zeros_like(block), block, branch


def attention_figures(
    lengths: Sequence[int],
    longest_dense: int,
    heads: tuple[int, int, int],
    repeats: int,
    device: torch.device,
) -> list[Figure]:
    """Time and peak memory of one layer, forward and backward, against the dense mask.

    Beyond ``longest_dense`` tokens the mask is not made: its bytes are counted, and the memory that
    segments take is held against those alone. The last figure says how that memory grows.
    """
    figures: list[Figure] = []
    per_token: list[float] = []
    for length in lengths:
        row = Row(length, heads, device)
        segments = partial(row.run, row.plan)
        if length > longest_dense:
            (ours_s,) = bests([segments], 1, _clock(device))
            mask_bytes = length**2 * (2 if device.type == "cuda" else 4)
            ours = peak_bytes(segments, device)
            per_token.append(ours / length)
            detail = f"{ours / _MEBIBYTE:.0f} of {mask_bytes / _MEBIBYTE:.0f} MiB (the mask alone);"
            detail += f" {ours_s:.2f} s, dense not run"
            name = f"attention memory, {length} tokens, / mask"
            figures.append(Figure(name, ours / mask_bytes, "x", 0.1, True, detail))
            continue
        dense = partial(row.run, row.bias)
        ours_s, dense_s = bests([segments, dense], repeats, _clock(device))
        ours, theirs = (peak_bytes(part, device) for part in (segments, dense))
        per_token.append(ours / length)
        times = f"{ours_s:.3f} of {dense_s:.3f} s"
        sizes = f"{ours / _MEBIBYTE:.0f} of {theirs / _MEBIBYTE:.0f} MiB"
        name = f"attention speed, {length} tokens, / dense"
        figures.append(Figure(name, dense_s / ours_s, "x", 1.0, False, times))
        name = f"attention memory, {length} tokens, / dense"
        figures.append(Figure(name, ours / theirs, "x", 0.5, True, sizes))
    growth = Figure(
        f"attention memory per token, {lengths[-1]} / {lengths[0]} tokens",
        per_token[-1] / per_token[0],
        "x",
        1.5,
        True,
        f"{per_token[-1]:.0f} of {per_token[0]:.0f} bytes",
    )
    return [*figures, growth, *_block_mask_figures(lengths[0], heads, repeats, device)]


def _block_mask_figures(
    length: int, heads: tuple[int, int, int], repeats: int, device: torch.device
) -> list[Figure]:
    """FlexAttention where it runs (CUDA); elsewhere only how long its block mask takes to make,
    without compiling."""
    row = Row(length, heads, device)
    clock = _clock(device)
    if device.type == "cuda":
        ours_s, flex_s = bests(
            [partial(row.run, row.plan), partial(row.run, row.blocks)], repeats, clock
        )
        name, detail = "segments / FlexAttention", f"{ours_s:.4f} of {flex_s:.4f} s"
        return [Figure(f"{name}, {length} tokens", flex_s / ours_s, "x", None, False, detail)]
    plan_s, blocks_s = bests([row.plan, row.blocks], repeats, clock)
    detail = f"{1e3 * plan_s:.2f} of {1e3 * blocks_s:.2f} ms"
    name = f"plan / block mask, {length} tokens, construction"
    return [Figure(name, plan_s / blocks_s, "x", None, True, detail)]


def _clock(device: torch.device) -> Clock:
    """CPU seconds on a CPU, whoever else is busy; elapsed ones elsewhere."""
    if device.type == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now
