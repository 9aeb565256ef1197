"""Experts of tokens in SGLang's schedulers: they lie in host memory, by slot of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def copy_routes(target: Tensor, source: Tensor) -> None:
    """Copy the experts of the tokens in slots ``source`` to slots ``target``, as their keys and
    values are, in an engine that records them.

    A pass has left its routes in host memory before its tokens are told, so they are there when
    branches are joined.
    """
    from sglang.srt.state_capturer import (  # pyright: ignore[reportMissingImports]
        routed_experts,
    )

    capturer: Any = routed_experts.get_global_experts_capturer()
    recorded = capturer.host_cache.buffer
    recorded[target.cpu()] = recorded[source.cpu()]


def allow_plain_memory() -> None:
    """Let SGLang keep routes on a CPU: it asks CUDA to pin the memory for them everywhere."""
    from sglang.srt.mem_cache.pool_host import common  # pyright: ignore[reportMissingImports]

    by_device: Any = common.ALLOC_MEMORY_FUNCS
    by_device.setdefault("cpu", _allocate)


def _allocate(
    dims: tuple[int, ...], dtype: torch.dtype, device: str, allocator: Any, **_: Any
) -> Tensor:
    return allocator.allocate(dims, dtype=dtype, device=device)
