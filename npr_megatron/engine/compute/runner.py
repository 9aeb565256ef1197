"""Runs batches on one device: storages, KV cache and forward pass behind numpy batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.compute.attention import PooledAttention
from npr_megatron.engine.compute.decode_rows import BucketLimits, decode_rows
from npr_megatron.engine.compute.device_batch import Placed, to_device
from npr_megatron.engine.compute.flashinfer import (
    FlashInferBatches,
    FlashInferReader,
    library_for,
)
from npr_megatron.engine.compute.graphs import GraphedDecode
from npr_megatron.engine.compute.host_attention import HostAttention
from npr_megatron.engine.compute.model import EngineModel
from npr_megatron.engine.compute.ranks import Ranks
from npr_megatron.engine.compute.scoring import score
from npr_megatron.engine.compute.static_decode import GatherReader, StaticDecode
from npr_megatron.engine.compute.transfer import Upload
from npr_megatron.engine.schedule.batch import Batch
from npr_megatron.records.trajectory import FloatArray, Trajectory
from npr_megatron.weights.storages import DTYPES

_MAX_GATHERED = 1 << 19
"""Slots that one graph gathers per layer: 2 GiB with eight key heads of 128 in bf16."""
_MAX_LISTED = 1 << 22
"""Slots that one graph reads through FlashInfer, which takes their indices only: 16 MiB."""


class Runner(Protocol):
    """What the engine asks of the hardware."""

    weights: dict[str, Tensor]
    """Live storages of this rank; written in place only."""
    device: torch.device

    def run(self, batch: Batch) -> Tensor:
        """Write the keys and values of ``batch``; return [M, V] fp32 logits, M may be 0."""
        ...

    def score(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Return, per trajectory, [T] log-probs by one masked pass."""
        ...

    def agree(self, version: int) -> None:
        """Let all ranks of the engine take over weight ``version``; raise if one cannot."""
        ...


class LocalRunner:
    """One device, one process.

    On a CPU every batch runs as it is, ragged. On CUDA steps of single tokens and short forced runs
    replay a graph, and what is longer or wider than any graph runs ragged, through FlashInfer where
    that is installed. Weights, keys and values are bf16 there if the configuration says so.

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
        on_gpu = self.device.type == "cuda"
        self.model = EngineModel(
            model,
            # Padding of static steps has a slot behind the pool to write to.
            num_slots=config.num_kv_slots + int(on_gpu),
            dtype=DTYPES[config.dtype],
            device=self.device,
            weights=config.weights,
            ranks=ranks,
        )
        self.weights = self.model.weights
        self._upload = Upload(self.device)
        library = library_for(self.model)
        self._paged = None if library is None else FlashInferBatches(library, self.model)
        self._graphs = None
        if on_gpu:
            num_rows = config.max_streams
            if library is None:
                reader = GatherReader(self.model.kv_cache, BucketLimits(num_rows, _MAX_GATHERED))
            else:
                reader = FlashInferReader(library, self.model, BucketLimits(num_rows, _MAX_LISTED))
            self._graphs = GraphedDecode(StaticDecode(self.model, reader), self.device)

    def run(self, batch: Batch) -> Tensor:
        """Write the keys and values of ``batch``; return [M, V] fp32 logits, M may be 0.

        To be called in inference mode.
        """
        rows = None if self._graphs is None else decode_rows(batch)
        if self._graphs is not None and rows is not None:
            logits = self._graphs.run(rows)
            if logits is not None:
                return logits
        if self._paged is not None:
            token_ids, position_ids, logit_index, attend = self._paged.place(batch, self._upload)
        else:
            token_ids, position_ids, logit_index, attend = self._place(batch)
        hidden = self.model.hidden(token_ids, position_ids, attend)
        return self.model.logits(hidden.index_select(0, logit_index))

    def _place(self, batch: Batch) -> Placed:
        kv_cache = self.model.kv_cache
        if self.device.type == "cpu" and kv_cache[0].dtype == torch.float32:
            arrays = (batch.token_ids, batch.position_ids, batch.logit_index)
            token_ids, position_ids, logit_index = map(torch.from_numpy, arrays)
            return Placed(token_ids, position_ids, logit_index, HostAttention(kv_cache, batch))
        placed = to_device(batch, self._upload)
        attend = PooledAttention(kv_cache, placed.slots, placed.groups)
        return Placed(placed.token_ids, placed.position_ids, placed.logit_index, attend)

    @torch.inference_mode()
    def score(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Return, per trajectory, [T] log-probs by one masked pass."""
        return score(self.model, trajectories)

    def agree(self, version: int) -> None:
        """Agree: there is no other rank."""
