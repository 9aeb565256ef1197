"""Megatron's optimizers, taken apart: nothing moves before the gradient is judged."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from npr_megatron.config.training import OptimizerConfig, TrainerConfig
from npr_megatron.errors import EnvironmentFault
from npr_megatron.model.fp8 import fp8_optimizer_flags
from npr_megatron.train.offload import count_offloaded_step, offload, start_offloaded_state
from npr_megatron.weights.storages import DTYPES

_MUON_PACKAGE = "emerging_optimizers"


def require_optimizer(trainer: TrainerConfig) -> None:
    """Refuse an optimizer whose package this machine has not.

    Raises:
        EnvironmentFault: as said.
    """
    if trainer.optimizer == "muon" and importlib.util.find_spec(_MUON_PACKAGE) is None:
        raise EnvironmentFault(
            'trainer.optimizer is "muon" and Python finds no package emerging_optimizers; install '
            "NVIDIA's Emerging-Optimizers from its repository (package indices do not have it), "
            'or set "adamw"'
        )


def build_optimizer(
    config: OptimizerConfig, wrapped: Sequence[DistributedDataParallel], trainer: TrainerConfig
) -> MegatronOptimizer:
    """Return a fresh optimizer over the parameters as they are now.

    Weight decay spares one-dimensional parameters. The learning rate is set before each step, see
    :func:`take_step`.
    """
    dtype = DTYPES[trainer.dtype]
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=wrapped[0].ddp_config.use_distributed_optimizer,
        overlap_param_gather=wrapped[0].ddp_config.overlap_param_gather,
        # Whole matrices are orthogonalised whatever the layout, not each rank's rows or columns.
        muon_tp_mode="duplicated",
        **fp8_optimizer_flags(trainer),
    )
    offload(megatron_config, trainer)
    optimizer = _builder(trainer)(megatron_config, [*wrapped])
    assert isinstance(optimizer, ChainedOptimizer), "Megatron's optimizers come in a chain"
    for part in optimizer.chained_optimizers:
        _start(part, config.weight_decay)
    return optimizer


def _builder(trainer: TrainerConfig) -> Callable[..., MegatronOptimizer]:
    if trainer.optimizer == "adamw":
        return get_megatron_optimizer
    from megatron.core.optimizer.muon import get_megatron_muon_optimizer

    return get_megatron_muon_optimizer


def _start(part: Any, weight_decay: float) -> None:
    """Give ``part`` its state, as a stage may be saved before its first update, and the decay of
    each of its groups, which Megatron leaves to a scheduler that is not used here."""
    if isinstance(part.optimizer, HybridDeviceOptimizer):
        start_offloaded_state(part.optimizer)
    else:
        part.init_state_fn(part.optimizer)
    for group in part.optimizer.param_groups:
        group["weight_decay"] = weight_decay * group["wd_mult"]
        if "betas" in group:  # Adam counts its steps in the group, Muon does not count
            group.setdefault("step", 0)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Make the accumulated gradients ready for a step; return their global L2 norm.

    Collective over all ranks. Weights and optimizer state are untouched.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def take_step(optimizer: MegatronOptimizer, learning_rate: float, norm: float) -> None:
    """Clip the gradients, whose norm :func:`gradient_norm` gave, and update the weights.

    Collective over all ranks.
    """
    assert isinstance(optimizer, ChainedOptimizer) and optimizer.config is not None
    clip_grad = optimizer.config.clip_grad
    chain = optimizer.chained_optimizers  # experts have one of their own
    parameters: list[torch.Tensor] = [p for part in chain for p in part.get_parameters()]
    if clip_grad > 0 and parameters:
        clip_grad_by_total_norm_fp32(
            parameters,
            clip_grad,
            norm,
            optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step_with_ready_grads()
    for part in chain:
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            count_offloaded_step(part.optimizer)
