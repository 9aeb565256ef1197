"""Keep SGLang on a CPU from padding the model.

It rounds widths and heads up to what its compiled CPU kernels like, which are not used here, and a
pushed part would no longer fit. And keep it from asking CUDA for the memory of routes, which it
allocates with the model. Only in engines whose weights our loader writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from npr_megatron.engine.sglang.options import WEIGHT_LOADER
from npr_megatron.engine.sglang.scheduler.routes import allow_plain_memory

TARGET = "sglang.srt.model_executor.model_runner.adjust_config_with_unaligned_cpu_tp"
"""Called on a CPU only, before the model is built."""


def keep_sizes(
    adjust: Callable[..., Any], model_config: Any, load_config: Any, tp_size: int
) -> Any:
    """Hook around :data:`TARGET`: leave the model of our engines as its ``config.json`` says."""
    from sglang.srt.runtime_context import get_model  # pyright: ignore[reportMissingImports]

    if WEIGHT_LOADER in (get_model().custom_weight_loader or []):
        allow_plain_memory()
        return model_config
    return adjust(model_config, load_config, tp_size)
