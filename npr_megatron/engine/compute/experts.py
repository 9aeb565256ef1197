"""A layer with experts: which K of its E each token goes to, and what they make of it.

The router's product is in the dtype of the storages, as trainers have it, the rest in fp32: softmax
over all experts, the K likeliest, their shares scaled to sum to 1 (HF's
``Qwen3MoeSparseMoeBlock``). Tokens are then sorted by expert, so that each expert with any reads
its weights once, and the K results of a token are added in the order of its experts, whoever shares
the batch.

Two ways to the products:

* one pair of products per expert that has tokens: any device, dtype and kind of weight; the host
  must know how many tokens each expert has, so on CUDA it waits for the device in every layer;
* grouped products (``torch.nn.functional.grouped_mm``), which read these numbers on the device and
  may be captured in a graph: bf16 on Hopper and later.

Over several ranks every rank routes alike, and holds a part of the inner channels of each expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.engine.compute.kernels import Kernels
from npr_megatron.engine.compute.quantised import BlockScaled, Weight, linear, weight_of
from npr_megatron.errors import InputError

_CHANNEL_MULTIPLE = 8
"""Rows of 16 bytes in bf16: what grouped products want of every matrix."""
_FIRST_GROUPED = 9
"""Compute capability from which torch has a grouped product of its own on the device."""


def check_computable(model: ModelConfig) -> None:
    """Refuse experts of which only the weights are known here.

    Raises:
        InputError: routers with a correction bias, or shared experts.
    """
    moe = model.moe
    if moe is not None and (moe.has_expert_bias or moe.shared_intermediate_size):
        raise InputError(
            f"the engine was asked to decode a model of family {model.family}, whose routers have "
            "a correction bias or whose layers have shared experts; it computes experts as "
            "Qwen3-MoE has them: use such a model"
        )


class Experts:
    """The experts of one layer, as far as this rank holds them.

    Args:
        storages: live storages; written in place only.
        prefix: before the names of the layer's storages.
    """

    def __init__(
        self, storages: Mapping[str, Tensor], prefix: str, moe: MoeConfig, kernels: Kernels
    ) -> None:
        self._router = storages[f"{prefix}gate.weight"]
        self._gate_up = weight_of(f"{prefix}experts.w13_weight", storages)
        self._down = weight_of(f"{prefix}experts.w2_weight", storages)
        self._each = [
            (_of(self._gate_up, number), _of(self._down, number))
            for number in range(moe.num_experts)
        ]
        self._num_chosen = moe.num_experts_per_tok
        self._numbers = torch.arange(moe.num_experts, device=self._router.device)
        self._kernels = kernels

    @cached_property
    def is_grouped(self) -> bool:
        """Whether a pass asks the host nothing."""
        gate_up, down = self._gate_up, self._down
        if isinstance(gate_up, BlockScaled) or isinstance(down, BlockScaled):
            return False
        widths = (gate_up.shape[-1], down.shape[-1])
        return (
            gate_up.is_cuda
            and gate_up.dtype == torch.bfloat16
            and not any(width % _CHANNEL_MULTIPLE for width in widths)
            and torch.cuda.get_device_capability(gate_up.device)[0] >= _FIRST_GROUPED
        )

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares [T, K] fp32, which sum to 1, and the experts [T, K] int64 of [T, H]
        tokens, the likeliest first.
        """
        likelihoods = F.linear(hidden, self._router).softmax(-1, dtype=torch.float32)
        shares, chosen = likelihoods.topk(self._num_chosen, dim=-1)
        return shares / shares.sum(-1, keepdim=True), chosen

    def compute(self, hidden: Tensor, shares: Tensor, chosen: Tensor) -> Tensor:
        """Return [T, H]: what the ``chosen`` experts make of ``hidden``, by their ``shares``.

        Of a rank that holds a part of each expert, this is its part of the sum.
        """
        owners, order = chosen.flatten().sort(stable=True)
        inputs = hidden.index_select(0, order // self._num_chosen)
        ordered = self._grouped(inputs, owners) if self.is_grouped else self._apart(inputs, owners)
        results = torch.empty_like(ordered).index_copy_(0, order, ordered)
        results = results.view(*chosen.shape, -1)
        return torch.bmm(shares[:, None].to(results.dtype), results)[:, 0]

    def _apart(self, inputs: Tensor, owners: Tensor) -> Tensor:
        """Return [T * K, H] of tokens sorted by expert, one expert after another."""
        counts = torch.bincount(owners, minlength=len(self._each)).tolist()
        pieces = [
            linear(self._kernels.gate(linear(rows, gate_up)), down)
            for rows, (gate_up, down) in zip(inputs.split(counts), self._each, strict=True)
            if len(rows)
        ]
        return torch.cat(pieces)

    def _grouped(self, inputs: Tensor, owners: Tensor) -> Tensor:
        """Return what :meth:`_apart` does, by products whose borders lie on the device."""
        gate_up, down = self._gate_up, self._down
        assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
        ends = torch.searchsorted(owners, self._numbers, right=True).int()
        gated = self._kernels.gate(F.grouped_mm(inputs, gate_up.transpose(1, 2), offs=ends))
        return F.grouped_mm(gated, down.transpose(1, 2), offs=ends)


def _of(stacked: Weight, number: int) -> Weight:
    """Return the matrix of one expert: a view."""
    if isinstance(stacked, BlockScaled):
        return BlockScaled(stacked.values[number], stacked.scales[number])
    return stacked[number]
