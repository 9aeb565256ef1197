"""Megatron's distributed AdamW, taken apart: nothing moves before the gradient is checked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer

from npr_megatron.config.training import OptimizerConfig, TrainerConfig
from npr_megatron.errors import DivergenceError
from npr_megatron.model.fp8 import fp8_optimizer_flags
from npr_megatron.weights.storages import DTYPES


def build_optimizer(
    config: OptimizerConfig, wrapped: Sequence[DistributedDataParallel], trainer: TrainerConfig
) -> MegatronOptimizer:
    """Return a fresh optimizer over the parameters as they are now.

    Weight decay spares one-dimensional parameters, as Megatron does by default. The learning rate
    is set before each step, see :func:`take_step`.
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
        use_distributed_optimizer=True,
        overlap_param_gather=wrapped[0].ddp_config.overlap_param_gather,
        **fp8_optimizer_flags(trainer),
    )
    optimizer = get_megatron_optimizer(megatron_config, [*wrapped])
    assert isinstance(optimizer, ChainedOptimizer), "the distributed optimizer comes in a chain"
    for part in optimizer.chained_optimizers:  # a stage may be saved before its first update
        part.init_state_fn(part.optimizer)
        for group in part.optimizer.param_groups:
            group.setdefault("step", 0)
    return optimizer


def take_step(optimizer: MegatronOptimizer, learning_rate: float, step: int) -> float:
    """Clip the accumulated gradients, update the weights and return the norm before clipping.

    Collective over all ranks.

    Raises:
        DivergenceError: the norm is not finite; weights and optimizer state are untouched.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        raise DivergenceError(
            f"step {step} needs a finite gradient, its norm is {norm}; the weights were "
            "not changed: resume from the last checkpoint with a lower learning rate, or inspect "
            "this batch"
        )
    clip_grad = optimizer.config.clip_grad
    parameters: list[torch.Tensor] = [*optimizer.get_parameters()]
    if clip_grad > 0 and parameters:
        clip_grad_by_total_norm_fp32(parameters, clip_grad, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step_with_ready_grads()
    return norm
