"""Runs batches on one device: storages, KV cache and forward pass behind numpy batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.compute.attention import PooledAttention
from npr_megatron.engine.compute.device_batch import to_device
from npr_megatron.engine.compute.model import EngineModel
from npr_megatron.engine.compute.ranks import Ranks
from npr_megatron.engine.compute.sampler import policy_logprobs
from npr_megatron.engine.compute.scoring import score
from npr_megatron.engine.schedule.batch import Batch
from npr_megatron.records.trajectory import FloatArray, Trajectory
from npr_megatron.weights.storages import DTYPES


class Runner(Protocol):
    """What the engine asks of the hardware."""

    weights: dict[str, Tensor]
    """Live storages of this rank; written in place only."""
    device: torch.device

    def run(self, batch: Batch) -> Tensor:
        """Write the keys and values of ``batch``; return [M, V] fp32 log-probs (policy, temperature
        1) of its logits, M may be 0.
        """
        ...

    def score(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Return, per trajectory, [T] log-probs by one masked pass."""
        ...

    def clear(self, slots: Sequence[int]) -> None:
        """Zero the keys and values of ``slots``."""
        ...

    def agree(self, version: int) -> None:
        """Let all ranks of the engine take over weight ``version``; raise if one cannot."""
        ...


class LocalRunner:
    """One device, one process.

    Args:
        ranks: those that the model is cut over; this one holds its shard. None for all of it.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        device: str | torch.device = "cpu",
        ranks: Ranks | None = None,
    ) -> None:
        self.device = torch.device(device)
        self._model = EngineModel(
            model,
            num_slots=config.num_kv_slots,
            dtype=DTYPES[config.dtype],
            device=self.device,
            weights=config.weights,
            ranks=ranks,
        )
        self.weights = self._model.weights

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Write the keys and values of ``batch``; return [M, V] log-probs of its logits."""
        placed = to_device(batch, self.device)
        attend = PooledAttention(self._model.kv_cache, placed.slots, placed.groups)
        hidden = self._model.hidden(placed.token_ids, placed.position_ids, attend)
        return policy_logprobs(self._model.logits(hidden.index_select(0, placed.logit_index)))

    @torch.inference_mode()
    def score(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Return, per trajectory, [T] log-probs by one masked pass."""
        return score(self._model, trajectories)

    @torch.inference_mode()
    def clear(self, slots: Sequence[int]) -> None:
        """Zero the keys and values of ``slots``."""
        index = torch.as_tensor(slots, dtype=torch.int64, device=self.device)
        for cache in self._model.kv_cache:
            cache.index_fill_(0, index, 0)

    def agree(self, version: int) -> None:
        """Agree: there is no other rank."""
