"""RMSNorm of torch; Megatron's own torch norm refuses sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from npr_megatron.model.host_norm import host_rms_norm


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm, called as a Megatron spec calls its norms.

    ``weight.sequence_parallel`` tells ``finalize_model_grads`` to sum this gradient over TP: under
    sequence parallelism each rank only saw its share of the tokens.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        weight: Any = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        weight.sequence_parallel = config.sequence_parallel
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``hidden`` [..., H] scaled to unit root mean square, times the weight."""
        if hidden.is_cuda:
            return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)
        return host_rms_norm(hidden, self.weight, self.eps)
