"""What a decoder layer computes between its matrix products: in torch on any device and dtype, by
compiled loops in fp32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from npr_megatron.engine.compute import host_kernels


class Kernels(Protocol):
    """Operations on a flat batch of T tokens."""

    def head_norms(self, fused: Tensor) -> Sequence[Tensor]:
        """Return per layer what :meth:`turn` takes, from [layers, 2, D] of queries and keys."""
        ...

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return [T, H] over its root mean square, computed in fp32, times ``weight`` [H]."""
        ...

    def turn(self, heads: Tensor, norms: Tensor | None, cos: Tensor, signed_sin: Tensor) -> None:
        """Rotate the queries and keys of ``heads`` [T, N + 2 K, D], in place.

        By the HF convention the two halves of D are the pair; cos and sin are [T, 1, D], and the
        first half of the sin is negated.

        Args:
            norms: of :meth:`head_norms`: queries and keys are normalised first; None leaves them.
        """
        ...

    def gate(self, gate_up: Tensor) -> Tensor:
        """Return [T, I]: SiLU of the first half of [T, 2 I], times the second half."""
        ...


def kernels_for(
    device: torch.device, dtype: torch.dtype, num_heads: tuple[int, int], eps: float
) -> Kernels:
    """Return the fastest kernels for a model of N query and K key heads."""
    on_host = device.type == "cpu" and dtype == torch.float32
    return HostKernels(num_heads, eps) if on_host else TorchKernels(num_heads, eps, device)


class TorchKernels:
    """Any device and dtype."""

    def __init__(self, num_heads: tuple[int, int], eps: float, device: torch.device) -> None:
        self._eps = eps
        self._num_turned = sum(num_heads)
        self._norm_of_head = torch.arange(2, device=device).repeat_interleave(
            torch.tensor(num_heads, device=device)
        )

    def head_norms(self, fused: Tensor) -> Sequence[Tensor]:
        """Spread the norms of all layers over the heads at once: [N + K, D] each."""
        return fused.index_select(1, self._norm_of_head).unbind()

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Call torch's norm: one kernel on CUDA."""
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self._eps)

    def turn(self, heads: Tensor, norms: Tensor | None, cos: Tensor, signed_sin: Tensor) -> None:
        """Use that ``rotate_half(x) * sin`` is ``roll(x, D / 2) * signed_sin``: one kernel less."""
        turned = heads[:, : self._num_turned]
        normed = turned
        if norms is not None:
            normed = F.rms_norm(turned, (turned.shape[-1],), None, self._eps) * norms
        rolled = torch.roll(normed, normed.shape[-1] // 2, dims=-1)
        torch.addcmul(normed.mul_(cos), rolled, signed_sin, out=turned)

    def gate(self, gate_up: Tensor) -> Tensor:
        """Multiply in place of the activation."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class HostKernels:
    """fp32 on a CPU."""

    def __init__(self, num_heads: tuple[int, int], eps: float) -> None:
        self._num_q, self._num_kv = num_heads
        self._eps = np.float32(eps)

    def head_norms(self, fused: Tensor) -> Sequence[Tensor]:
        """Leave them as they are: [2, D] each."""
        return fused.unbind()

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Read each row twice, the second time from the cache."""
        out = torch.empty_like(hidden)
        host_kernels.rms_norm(hidden.numpy(), weight.numpy(), self._eps, out.numpy())
        return out

    def turn(self, heads: Tensor, norms: Tensor | None, cos: Tensor, signed_sin: Tensor) -> None:
        """Touch nothing but the heads."""
        computed, angles = heads.numpy(), (cos.numpy(), signed_sin.numpy())
        if norms is None:
            host_kernels.rotate(computed, self._num_q + self._num_kv, *angles)
        else:
            host_kernels.turn(
                computed, self._num_q, self._num_kv, norms.numpy(), self._eps, *angles
            )

    def gate(self, gate_up: Tensor) -> Tensor:
        """Write each result once."""
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        host_kernels.gate(gate_up.numpy(), out.numpy())
        return out
