"""An engine's configuration in SGLang's words: its options, its environment, its model folder.

What SGLang cannot do for us is refused before (``config.engine_check``). Pure but for
:func:`write_model_folder`; imports neither torch nor SGLang.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.engine_check import DeviceType
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.sglang.stage import CACHE_BACKEND
from npr_megatron.weights.checkpoints.hf_config import hf_config

WEIGHT_LOADER = "npr_megatron.engine.sglang.weights.loader.load"
"""Dotted path of what writes pushed weights into a rank's parameters."""
NO_VERSION = -1
"""Weight version of an engine that nothing was pushed to."""

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_ROW_SLACK = 16
"""SGLang keeps a few tokens at the end of the longest row to itself."""


def server_options(
    model: ModelConfig, config: EngineConfig, device: DeviceType, folder: Path
) -> dict[str, Any]:
    """Return the keyword arguments of ``sglang.Engine`` (``ServerArgs``).

    Args:
        device: type of device of every rank.
        folder: what :func:`write_model_folder` wrote.
    """
    has_graphs = device == "cuda" and config.sglang.cuda_graphs
    return {
        "model_path": str(folder),
        "skip_tokenizer_init": True,
        "incremental_streaming_output": True,
        "skip_server_warmup": True,
        "device": device,
        "dtype": _DTYPES[config.dtype],
        "tp_size": config.tp_size,
        "dp_size": config.sglang.dp_size,
        "context_length": row_tokens(model, config),
        "max_total_tokens": config.num_kv_slots,
        "max_running_requests": config.max_streams,
        "chunked_prefill_size": config.max_step_tokens,
        "max_prefill_tokens": config.max_step_tokens,
        "page_size": 1,
        "attention_backend": _attention(config, device),
        "radix_cache_backend": CACHE_BACKEND,
        "disable_overlap_schedule": not config.sglang.overlap,
        "disable_cuda_graph": not has_graphs,
        "disable_prefill_cuda_graph": True,  # decoding is what graphs pay for
        "cuda_graph_max_bs_decode": config.max_streams if has_graphs else None,
        "enable_return_routed_experts": config.record_routes and model.moe is not None,
        "load_format": "dummy",  # weights are pushed
        "custom_weight_loader": [WEIGHT_LOADER],
        "weight_version": str(NO_VERSION),
        "sleep_on_idle": True,  # otherwise every rank of an idle engine takes a whole core
        "random_seed": 0,
        "log_level": "error",
    }


def server_environment(
    config: EngineConfig,
    device: DeviceType,
    cores: Sequence[int],
    environment: Mapping[str, str],
) -> dict[str, str]:
    """Return the variables under which SGLang's processes must be started.

    Args:
        cores: CPU cores that this process may use (``os.sched_getaffinity``).
        environment: that of this process; ranks share the threads that it sets.
    """
    variables = {
        # rows are copied by torch: SGLang's own kernel for it comes with speculative decoding only
        "SGLANG_NATIVE_MOVE_KV_CACHE": "1",
        # or a host whose scheduler has failed waits for diagnoses for a minute before it ends
        "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
        "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
    }
    if config.debug_checks:
        variables["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "2"
        variables["SGLANG_ENABLE_RANK_CONSENSUS_CHECKER"] = "1"
    if device == "cpu":
        # Threads that spin against other processes make a request ten times slower.
        threads = int(environment.get("OMP_NUM_THREADS", "1").split(",")[0])
        variables |= {
            "OMP_NUM_THREADS": str(max(1, threads // config.num_devices)),
            "SGLANG_CPU_OMP_THREADS_BIND": _cores_of_ranks(cores, config.num_devices),
            "SGLANG_USE_CPU_ENGINE": "0",  # SGLang's own CPU platform needs compiled operators
        }
    return variables


def write_model_folder(model: ModelConfig, config: EngineConfig, folder: Path) -> None:
    """Write the ``config.json`` from which SGLang builds the model; there are no weights in it."""
    longest = max(row_tokens(model, config), model.max_position_embeddings)
    told = model.model_copy(update={"max_position_embeddings": longest})
    settings = {**hf_config(told), "torch_dtype": _DTYPES[config.dtype]}
    (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def row_tokens(model: ModelConfig, config: EngineConfig) -> int:
    """Return the tokens of the longest linear row: branches one behind the other take more room
    than positions.
    """
    longest = min(config.num_kv_slots, config.max_plans * model.max_position_embeddings)
    return longest + _ROW_SLACK


def usable_cores() -> tuple[int, ...]:
    """Return the CPU cores that this process may use."""
    return tuple(sorted(os.sched_getaffinity(0)))


def _attention(config: EngineConfig, device: DeviceType) -> str | None:
    if config.sglang.attention_backend is not None:
        return config.sglang.attention_backend
    if device == "cpu":
        return "torch_native"
    return "triton" if config.dtype == "fp32" else None


def _cores_of_ranks(cores: Sequence[int], num_ranks: int) -> str:
    """Return the cores of each rank, dealt out evenly: ``0,1|2,3``; ranks share where there are
    fewer cores than ranks."""
    if len(cores) < num_ranks:
        parts = [[cores[rank % len(cores)]] for rank in range(num_ranks)]
    else:
        parts = [list(cores[rank::num_ranks]) for rank in range(num_ranks)]
    return "|".join(",".join(map(str, part)) for part in parts)
