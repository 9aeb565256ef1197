"""The experts of every token whose keys and values are in the pool, in the same slots.

Whatever shares, moves or replays keys and values thereby shares, moves or replays routes: a prompt
that others computed has them, a join costs nothing, and a trajectory's routes are read from its
slots at its end. Slot 0 belongs to nobody and says -1: not computed.

Memory: 2 bytes per slot, layer with experts and chosen expert; 768 bytes a token for 48 layers of
8 experts, against 98,304 of keys and values in bf16 (4 key heads of 128).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.memory.pool import SlotArray
from npr_megatron.records.trajectory import RouteArray

Record = Callable[[int, Tensor], None]
"""Takes down, of a layer with experts (counted from 0), the experts [T, K] of a batch."""


class RouteCache:
    """Routes beside a KV cache of ``num_slots`` + 1 slots."""

    def __init__(self, model: ModelConfig, num_slots: int, device: torch.device) -> None:
        moe = model.moe
        assert moe is not None, "only models with experts have routes"
        num_layers = max(0, model.num_hidden_layers - moe.num_dense_layers)
        shape = (num_layers, num_slots + 1, moe.num_experts_per_tok)
        self._experts = torch.full(shape, -1, dtype=torch.int16, device=device)

    def recorder(self, slots: Tensor) -> Record:
        """Return what writes the routes of a batch to its ``slots`` [T] int64; asks the host
        nothing.
        """

        def record(layer: int, chosen: Tensor) -> None:
            self._experts[layer].index_copy_(0, slots, chosen.to(torch.int16))

        return record

    def read(self, slots: SlotArray) -> RouteArray:
        """Return [T, M, K]: the experts of the tokens in ``slots``, -1 for slot 0."""
        index = torch.from_numpy(slots).to(self._experts.device, torch.int64)
        return self._experts.index_select(1, index).transpose(0, 1).contiguous().cpu().numpy()
