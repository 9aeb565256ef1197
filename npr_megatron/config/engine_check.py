"""Rules of one engine: what its backend can do with a model and a device. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from npr_megatron.config.divisions import attention_problems, divides, mlp_problems
from npr_megatron.config.engine import ClusterConfig, EngineConfig
from npr_megatron.config.families import TRAINABLE_FAMILIES, family_problems
from npr_megatron.config.model import ModelConfig

DeviceType = Literal["cpu", "cuda"]

SGLANG_ROW_MULTIPLE = 64
"""SGLang pads vocabulary rows to a multiple of this before it cuts them."""

_HALF_ONLY = ("fa3", "flashinfer")
_ATTENTION: dict[DeviceType, tuple[str, ...]] = {
    "cpu": ("torch_native",),
    "cuda": (*_HALF_ONLY, "triton", "torch_native"),
}
"""Kernels that read keys and values row by row: joined rows lie anywhere in the pool."""


def engine_problems(
    engine: EngineConfig, model: ModelConfig | None, device: DeviceType
) -> list[str]:
    """Return one sentence for each thing that ``engine.backend`` cannot do.

    Args:
        model: what it decodes; None skips the rules about its shape.
    """
    if engine.backend == "embedded":
        return list(_embedded(engine))
    problems = [*_sglang(engine, device)]
    return problems if model is None else [*problems, *_sglang_model(engine, model)]


def seat_problems(engine: EngineConfig, cluster: ClusterConfig) -> list[str]:
    """Return what is wrong with the GPUs that a replica is given."""
    gpus, needed = cluster.gpus_per_replica, engine.num_devices
    if engine.backend == "sglang" and gpus > 0 and gpus != needed:
        return [
            f"cluster.gpus_per_replica is {gpus:g} and an SGLang engine of engine.tp_size "
            f"{engine.tp_size} and engine.sglang.dp_size {engine.sglang.dp_size} takes {needed} "
            f"whole GPUs; set gpus_per_replica = {needed}"
        ]
    return []


def device_of(cluster: ClusterConfig) -> DeviceType:
    """Return where the replicas of a run compute."""
    return "cuda" if cluster.gpus_per_replica > 0 else "cpu"


def _embedded(engine: EngineConfig) -> Iterator[str]:
    if engine.tp_size > 1:
        yield (
            f"engine.tp_size is {engine.tp_size} and the embedded backend is cut by torchrun "
            '(npr generate); set engine.tp_size = 1, or engine.backend = "sglang"'
        )
    if engine.sglang.dp_size > 1:
        yield (
            f"engine.sglang.dp_size is {engine.sglang.dp_size} and the embedded backend holds one "
            'copy of the model; raise fleet.num_replicas, or set engine.backend = "sglang"'
        )


def _sglang(engine: EngineConfig, device: DeviceType) -> Iterator[str]:
    attention, allowed = engine.sglang.attention_backend, _ATTENTION[device]
    if engine.weights != "as_trained":
        yield (
            f'engine.weights is "{engine.weights}" and the SGLang backend computes with weights as '
            'they are trained; set engine.weights = "as_trained", or engine.backend = "embedded"'
        )
    if engine.kv_after_push == "keep" and engine.sglang.overlap:
        yield (
            'engine.kv_after_push is "keep" and SGLang, when it schedules ahead, says of tokens '
            "computed just before a push that they are of the new weights; set "
            'engine.sglang.overlap = false, or kv_after_push = "recompute" or "drop"'
        )
    if attention is not None and attention not in allowed:
        yield (
            f'engine.sglang.attention_backend is "{attention}" and joined branches need kernels '
            f"that take keys and values row by row, on {device} one of {', '.join(allowed)}; "
            "choose one, or leave it out"
        )
    if device == "cuda" and engine.dtype == "fp32" and attention in _HALF_ONLY:
        yield (
            f'engine.sglang.attention_backend is "{attention}", which computes in 16 bits, and '
            'engine.dtype is fp32; set attention_backend = "triton", or dtype = "bf16"'
        )


def _sglang_model(engine: EngineConfig, model: ModelConfig) -> Iterator[str]:
    if model.family not in TRAINABLE_FAMILIES:
        yield (
            f"the model is of family {model.family} and the SGLang backend is proven for "
            f"{', '.join(TRAINABLE_FAMILIES)} only; use one of them"
        )
    for problem in family_problems(model):
        yield f"SGLang computes a model as its family says, and {problem}"
    if model.family == "qwen3_moe" and model.moe is not None and model.moe.num_dense_layers:
        yield (
            f"the first {model.moe.num_dense_layers} layers of the model have no experts and "
            'SGLang gives experts to every layer of Qwen3-MoE; set engine.backend = "embedded"'
        )
    tp_size, asked_by = engine.tp_size, "engine.tp_size"
    rows = -(-model.vocab_size // SGLANG_ROW_MULTIPLE) * SGLANG_ROW_MULTIPLE
    yield from attention_problems(model, tp_size, asked_by)
    yield from mlp_problems(model, tp_size, tp_size, (asked_by, asked_by))
    yield from divides("padded vocab_size", rows, tp_size, asked_by)
