"""Make Megatron's offloading of optimizer state work where the device is the CPU itself.

It asks each parameter whether it is on CUDA, keeps a share of those that are, and copies the others
to the CPU. Here all parameters of a rank count as on the device while it splits them, and a copy
"to the CPU" is a tensor of its own: the same split, the same two optimizers, the same copies back
and forth, without a second memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_KEEPS_ITS_PLACE = (torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.float)


def split_on_one_device() -> None:
    """Replace how Megatron splits parameters between the device and the CPU. Idempotent."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    hybrid: Any = HybridDeviceOptimizer
    split = hybrid._get_sub_optimizer_param_groups
    if split.__module__ == __name__:
        return

    def split_as_if_on_cuda(self: Any, offload_fraction: float) -> Any:
        params = [param for group in self.param_groups for param in group["params"]]
        with _SeenOnCuda(params):
            return split(self, offload_fraction)

    hybrid._get_sub_optimizer_param_groups = split_as_if_on_cuda


class _SeenOnCuda(TorchFunctionMode):
    """Says that given tensors, and what is made from them in place, are on CUDA."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()
        # By identity, and held on to: a number of a freed tensor would be given to another.
        self._on_cuda = {id(tensor): tensor for tensor in tensors}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # pyright: ignore[reportAttributeAccessIssue] - a C property
            return id(args[0]) in self._on_cuda
        if func is torch.Tensor.cpu:
            return args[0].clone()
        result = func(*args, **(kwargs or {}))
        if func in _KEEPS_ITS_PLACE and id(args[0]) in self._on_cuda:
            self._on_cuda[id(result)] = result
        return result
