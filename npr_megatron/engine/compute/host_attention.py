"""Attention over the pool in fp32 on a CPU: single queries and short runs read their keys where
they lie; only long runs, and beginnings that many rows share, are worth a copy and matrix products.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from npr_megatron.engine.compute import host_kernels
from npr_megatron.engine.compute.attention import Reading, attend_group, split_heads
from npr_megatron.engine.compute.decode_rows import block_of, run_of
from npr_megatron.engine.compute.device_batch import on_host
from npr_megatron.engine.schedule.batch import Batch, IndexArray

_LONGEST_RUN = 16
"""Queries of a row that are read for one by one. Against copies and products of matrices that is
2 to 3 times as fast for 2 queries, 1.6 times for 16 that begin a row, even for 16 behind 100 tokens
and slower for more (64 to 1,024 floats per slot).
"""
_LEAST_SHARED_OUT = 1 << 19
"""Products per layer from which threads are worth waking: a quarter of a millisecond."""


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Consecutive tokens that each read a list of slots of their own."""

    tokens: slice
    keys: IndexArray
    """[B, L]"""
    lengths: IndexArray
    """[B]"""

    def parts(self, count: int) -> list[_Rows]:
        """Cut into ``count`` pieces that read equally much."""
        read = np.cumsum(self.lengths)
        ends = np.searchsorted(read, read[-1] * np.arange(1, count + 1) / count) + 1
        starts = [0, *ends[:-1].tolist()]
        first = self.tokens.start
        return [
            _Rows(slice(first + a, first + b), self.keys[a:b], self.lengths[a:b])
            for a, b in zip(starts, ends.tolist(), strict=True)
            if a < b
        ]


class HostAttention:
    """Does what ``PooledAttention`` does.

    Args:
        kv_cache: per layer [slots + 1, 2 K, D]; the slots of ``batch`` are overwritten.
    """

    def __init__(self, kv_cache: Sequence[Tensor], batch: Batch) -> None:
        self._kv_cache = kv_cache
        self._slots = batch.slots
        self._scale = np.float32(kv_cache[0].shape[-1] ** -0.5)
        self._rows: list[_Rows] = []
        self._others: list[Reading] = []
        self._threads: ThreadPoolExecutor | None = None
        num_threads = torch.get_num_threads()
        for group in batch.groups:
            if group.num_shared or run_of(group) > _LONGEST_RUN:
                self._others.append(Reading.of(on_host(group), torch.float32))
                continue
            lengths, keys = block_of(group)
            rows = _Rows(slice(group.start, group.start + group.count), keys, lengths)
            num_products = int(lengths.sum()) * kv_cache[0][0].numel()
            if num_threads > 1 and num_products >= _LEAST_SHARED_OUT:
                self._threads = _threads(num_threads, os.getpid())
                self._rows += rows.parts(num_threads)
            else:
                self._rows.append(rows)

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        cache = self._kv_cache[layer]
        stored, computed = cache.numpy(), heads.numpy()
        host_kernels.store(computed, self._slots, stored)
        queries, _ = split_heads(heads, cache.shape[1])
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        result = out.numpy()

        def read(rows: _Rows) -> None:
            tokens = rows.tokens
            host_kernels.attend(
                computed[tokens], stored, rows.keys, rows.lengths, self._scale, result[tokens]
            )

        run = map if self._threads is None else self._threads.map
        for _ in run(read, self._rows):
            pass
        for group in self._others:
            flat = attend_group(group, queries[group.tokens], cache)
            out[group.tokens] = flat.view(-1, *out.shape[1:])
        return out.flatten(1)


@cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Return the threads of ``process``: a fork has none of its parent's."""
    return ThreadPoolExecutor(count, thread_name_prefix="npr-attention")
