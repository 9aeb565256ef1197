"""AdamW of torch with the state layout of the fused Adam of TransformerEngine and apex.

Megatron's distributed optimizer reads ``exp_avg`` and ``exp_avg_sq`` per parameter and ``step``
in the parameter *group*; ``torch.optim.AdamW`` keeps ``step`` per parameter, and a checkpoint
written with it cannot be loaded again. The arithmetic is torch's fused kernel of the device, one
call per group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def install_adam() -> None:
    """Give Megatron this Adam, for this process: on CPU, and where it finds none of NVIDIA's."""
    import megatron.core.optimizer as megatron_optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizers: Any = megatron_optimizer
    optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER = FusedLayoutAdam, False
    distributed: Any = distrib_optimizer
    distributed.Adam = FusedLayoutAdam
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True


class FusedLayoutAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay and bias correction, called as Megatron calls it."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
    ) -> None:
        if not (adam_w_mode and bias_correction):
            raise ValueError("only Adam with decoupled weight decay and bias correction is built")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient, and count the step in its group."""
        assert closure is None, "Megatron passes none"
        kernels: Any = torch
        for group in self.param_groups:
            params: list[Tensor] = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            states = [self._state_of(param) for param in params]
            kernels._fused_adamw_(
                params,
                [param.grad for param in params if param.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [torch.tensor(float(group["step"]), device=params[0].device)] * len(params),
                amsgrad=False,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                grad_scale=None,
                found_inf=None,
            )

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        return state
