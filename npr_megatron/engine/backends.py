"""Who computes: the one place that knows which engines there are.

A backend is imported when it is chosen, so the embedded engine works where SGLang is missing.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.engine_check import DeviceType, engine_problems
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.compute.model import storage_layout
from npr_megatron.engine.interface import Engine
from npr_megatron.errors import ConfigError, EnvironmentFault
from npr_megatron.records.request import GenerationRequest
from npr_megatron.schema.tags import Vocabulary
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.tiles import Layout


def create_engine(
    model: ModelConfig,
    config: EngineConfig,
    vocabulary: Vocabulary,
    device: str | torch.device,
) -> Engine:
    """Return an engine of ``config.backend`` without weights; close it when it is done.

    Args:
        device: where it computes; SGLang takes its type only, and all devices that this process
            sees.

    Raises:
        ConfigError: the backend cannot do what ``config`` asks of it.
        EnvironmentFault: the backend is not installed or does not come up.
    """
    kind = _device_type(device)
    if problems := engine_problems(config, model, kind):
        raise ConfigError(problems)
    match config.backend:
        case "embedded":
            from npr_megatron.engine.embedded import EmbeddedEngine

            return EmbeddedEngine(model, config, vocabulary, device=device)
        case "sglang":
            _require_sglang()
            from npr_megatron.engine.sglang.engine import SglangEngine

            return SglangEngine(model, config, vocabulary, device=kind)


def storages_of(model: ModelConfig, config: EngineConfig) -> Layout:
    """Return the layout of ``Engine.weights``: one rank, however many devices compute.

    Raises:
        LayoutError: the matrices cannot be kept as ``config.weights`` says.
    """
    match config.backend:
        case "embedded":
            return storage_layout(model, weights=config.weights)
        case "sglang":
            return engine_layout(model, engine="sglang")


def slots_needed(request: GenerationRequest, config: EngineConfig) -> int:
    """Return a ``num_kv_slots`` that is enough for ``request`` alone."""
    match config.backend:
        case "embedded":
            return len(request.prompt_ids) + request.max_new_tokens + 1
        case "sglang":
            from npr_megatron.engine.sglang.client.reservations import pool_for

            return pool_for(request, config)


def _device_type(device: str | torch.device) -> DeviceType:
    return "cpu" if torch.device(device).type == "cpu" else "cuda"


def _require_sglang() -> None:
    """Say how to install SGLang where it is missing. It is not imported: its process does that."""
    if find_spec("sglang") is None:
        raise EnvironmentFault(
            'engine.backend is "sglang" and SGLang is not installed here; run '
            '`bash tools/setup_sglang`, or set engine.backend = "embedded"'
        )
