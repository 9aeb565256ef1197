"""AdamW whose state partly lives, and is updated, in the memory of the CPU.

Megatron's HybridDeviceOptimizer splits the parameters of a rank: one part is updated on the device,
the other on the CPU, where copies to and from the device overlap with the updates of single
parameters. Checkpoints hold what they hold without offloading, so a run may go on with another
share. Three things are missing in megatron-core 0.16.1 and are added here:

* fresh moments of zero: it would fill empty ones by a step along random gradients, when a
  checkpoint is read before the first update;
* the number of steps in its own parameter groups: it hands them to the fused Adam of the device
  before each step, and a number that a checkpoint has left there would stop bias correction from
  advancing;
* groups that can be read back.

A fourth is a rule of ``config.optimizer_check``: it takes no shards of weights that are fp32.
"""

from __future__ import annotations

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from npr_megatron.config.training import TrainerConfig

_NOT_FOR_CHECKPOINTS = (
    "offload_fraction",
    "cpu_optimizer_cls",
    "gpu_optimizer_cls",
    "param_update_in_fp32",
    "pin_cpu_grads",
    "pin_cpu_params",
    "overlap_cpu_optimizer_d2h_h2d",
)
"""What it notes about itself in parameter groups; no checkpoint may hold the classes among it."""


def offload(config: OptimizerConfig, trainer: TrainerConfig) -> None:
    """Tell Megatron's ``config`` how much is the CPU's; nothing where all is the device's."""
    if trainer.optimizer_offload_frac == 0:
        return
    config.optimizer_cpu_offload = True
    config.optimizer_offload_fraction = trainer.optimizer_offload_frac
    config.overlap_cpu_optimizer_d2h_h2d = True
    # The hybrid optimizer keeps fp32 copies itself, or those of offloaded weights would stay on the
    # device. Set behind Megatron's back, which asks for TransformerEngine and does not use it here.
    config.use_precision_aware_optimizer = True
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    config.store_param_remainders = False


def start_offloaded_state(optimizer: HybridDeviceOptimizer) -> None:
    """Give every parameter moments of zero, so that a stage may be saved before its first step."""
    for group in optimizer.param_groups:
        for name in _NOT_FOR_CHECKPOINTS:
            group.pop(name)
    optimizer.register_load_state_dict_post_hook(_update_in_one_kernel)
    for part in optimizer.sub_optimizers:
        for group in part.param_groups:
            for param in group["params"]:
                state = part.state[param]
                state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
                if isinstance(part, torch.optim.AdamW):  # the fused one counts for a whole group
                    state["step"] = torch.zeros((), dtype=torch.float32)
    optimizer._sync_sub_optimizers_state_to_hdo()


def _update_in_one_kernel(optimizer: torch.optim.Optimizer) -> None:
    """A checkpoint written without offloading does not say how the CPU is to compute."""
    for group in optimizer.param_groups:
        group["fused"] = True


def count_offloaded_step(optimizer: HybridDeviceOptimizer) -> None:
    """Take down that a step was taken."""
    for group in optimizer.param_groups:
        group["step"] += 1
