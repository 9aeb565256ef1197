"""Runs batches on one device: storages, KV cache and forward pass behind numpy batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

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
from npr_megatron.engine.compute.routes import RouteCache
from npr_megatron.engine.compute.scoring import score
from npr_megatron.engine.compute.static_decode import GatherReader, StaticDecode
from npr_megatron.engine.compute.transfer import Upload
from npr_megatron.engine.memory.pool import SlotArray
from npr_megatron.engine.schedule.batch import Batch
from npr_megatron.records.trajectory import FloatArray, RouteArray, Trajectory
from npr_megatron.weights.storages import DTYPES

_log = logging.getLogger(__name__)

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

    def routes(self, slots: SlotArray) -> RouteArray | None:
        """Return [T, M, K] the experts that computed the tokens in ``slots``, -1 for slot 0; None
        where none are recorded.
        """
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
    that is installed. Weights, keys and values are bf16 there if the configuration says so. Experts
    outside of bf16 on Hopper are shared out by the host, so nothing is captured with them.

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
        # Padding of static steps has a slot behind the pool to write to.
        num_slots = config.num_kv_slots + int(on_gpu)
        self.model = EngineModel(
            model,
            num_slots=num_slots,
            dtype=DTYPES[config.dtype],
            device=self.device,
            weights=config.weights,
            ranks=ranks,
        )
        self.weights = self.model.weights
        self._routes = None
        if config.record_routes and model.moe is not None:
            self._routes = RouteCache(model, num_slots, self.device)
        self._upload = Upload(self.device)
        library = library_for(self.model)
        self._paged = None if library is None else FlashInferBatches(library, self.model)
        self._graphs = self._static_steps(config.max_streams, library) if on_gpu else None

    def _static_steps(self, num_rows: int, library: Any | None) -> GraphedDecode | None:
        """Return the decode step as graphs; None where it cannot be captured."""
        if self.model.asks_the_host:
            _log.warning(
                "decode steps run without CUDA graphs: experts are computed in fixed memory in "
                "bf16 on Hopper GPUs or later only, with weights as they are trained"
            )
            return None
        if library is None:
            reader = GatherReader(self.model.kv_cache, BucketLimits(num_rows, _MAX_GATHERED))
        else:
            reader = FlashInferReader(library, self.model, BucketLimits(num_rows, _MAX_LISTED))
        return GraphedDecode(StaticDecode(self.model, reader, self._routes), self.device)

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
            placed = self._paged.place(batch, self._upload)
        else:
            placed = self._place(batch)
        record = None if self._routes is None else self._routes.recorder(placed.slots)
        hidden = self.model.hidden(placed.token_ids, placed.position_ids, placed.attend, record)
        return self.model.logits(hidden.index_select(0, placed.logit_index))

    def routes(self, slots: SlotArray) -> RouteArray | None:
        """Return [T, M, K] the experts that computed the tokens in ``slots``, -1 for slot 0; None
        where none are recorded.
        """
        return None if self._routes is None else self._routes.read(slots)

    def _place(self, batch: Batch) -> Placed:
        kv_cache = self.model.kv_cache
        if self.device.type == "cpu" and kv_cache[0].dtype == torch.float32:
            arrays = (batch.token_ids, batch.position_ids, batch.slots, batch.logit_index)
            return Placed(*map(torch.from_numpy, arrays), attend=HostAttention(kv_cache, batch))
        placed = to_device(batch, self._upload)
        return Placed(
            placed.token_ids,
            placed.position_ids,
            placed.slots,
            placed.logit_index,
            PooledAttention(kv_cache, placed.slots, placed.groups),
        )

    @torch.inference_mode()
    def score(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Return, per trajectory, [T] log-probs by one masked pass."""
        return score(self.model, trajectories)

    def agree(self, version: int) -> None:
        """Agree: there is no other rank."""
