"""The state of a trainer as Megatron's sharded state dict: weights, optimizer, random states.

The optimizer's state is stored fully reshardable and layers are named by their number in the model,
so TP, PP, VPP, DP and EP may change between save and load. Random states belong to ranks: they
come back where the layout is the same, and stay as the ranks were seeded where it is not.
"""

from __future__ import annotations

import gc
import io
import queue
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.metadata import Metadata

from npr_megatron.model.gpt import BranchGPT
from npr_megatron.train.checkpoint_manifest import Origin

_RANDOM = "random_states"


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """What a checkpoint holds of one rank, live."""

    chunks: Sequence[BranchGPT]
    optimizer: MegatronOptimizer
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """What a rank writes, in host memory, and what rank 0 needs to say where everything is."""

    writer: FileSystemWriterAsync
    buckets: list[Any]
    metadata: Metadata | None
    """On rank 0."""
    common: bytes
    """What is the same on every rank."""


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron's plan of who writes what, without its own ending, in which a rank that fails
    leaves the others waiting in a collective."""

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any) -> Any:
        return writer, save_state_dict_ret[1]


class SavePlanner:
    """Plans the saves of one trainer state.

    What is equal on all ranks of a data-parallel group is dealt out, so that each of them writes
    its share. Who writes what is worked out, and checked to cover every tensor once, by the first
    plan only.
    """

    def __init__(self, state: TrainerState) -> None:
        self.state = state
        self._strategy: Any = _PlanOnly("torch_dist", 1, thread_count=1)
        group = _replicas()
        if dist.get_world_size(group) > 1:
            self._strategy = FullyParallelSaveStrategyWrapper(
                self._strategy, group, do_cache_distribution=True
            )
        self._is_first = True
        # Megatron collects garbage in every plan, which takes 0.4 s over all that a rank has
        # imported and 10 ms over the rest.
        gc.collect()
        gc.freeze()

    def plan(self, step: int, partial: Path) -> SavePlan:
        """Return what this rank has to write to ``partial``. Collective; writes nothing."""
        state = _sharded(self.state, step, is_loading=False)
        sharded, common = save_preprocess(state, validate_access_integrity=self._is_first)
        self._is_first = False
        # Its results never leave the process that we write in, and Megatron's own queue for them is
        # a process of its own.
        filesystem: Any = filesystem_async
        filesystem._results_queue = filesystem._results_queue or queue.SimpleQueue()
        writer, metadata = self._strategy.async_save(sharded, str(partial))
        stored = io.BytesIO()
        torch.save(common, stored)
        return SavePlan(
            writer=writer,
            buckets=FileSystemWriterAsync.preload_tensors(writer.write_buckets, True),
            metadata=metadata,
            common=stored.getvalue(),
        )


def load_state(state: TrainerState, path: Path, *, same_layout: bool) -> int:
    """Restore ``state`` in place from a ``torch_dist`` folder; return its step. Collective."""
    wanted = _sharded(state, 0, is_loading=True)
    if not same_layout:
        del wanted[_RANDOM]
    strategy: Any = dist_checkpointing.serialization.get_default_load_sharded_strategy(str(path))
    group = _replicas()
    if dist.get_world_size(group) > 1:  # each reads its share, then they exchange
        strategy = FullyParallelLoadStrategyWrapper(strategy, group)
    found: Any = dist_checkpointing.load(wanted, str(path), sharded_strategy=strategy)
    for number, chunk in enumerate(state.chunks):
        chunk.load_state_dict(found[_model_key(number)])
    state.optimizer.load_state_dict(found["optimizer"])
    if same_layout:
        _set_random_states(found[_RANDOM])
    return int(found["step"])


def _sharded(state: TrainerState, step: int, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": _replicas(),
    }
    models = {
        _model_key(number): chunk.sharded_state_dict(metadata=metadata)
        for number, chunk in enumerate(state.chunks)
    }
    optimizer = state.optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata)
    random = ShardedObject(
        _RANDOM, _random_states(), (dist.get_world_size(),), (dist.get_rank(),), replica_id=0
    )
    whole = {**models, "optimizer": optimizer, "step": torch.tensor(step), _RANDOM: random}
    # Weights kept in FP8 are stored as the numbers they mean, for whoever goes on from them; and
    # the process that writes could not work those out.
    force_all_tensors_to_non_fp8(whole)
    return whole


def _replicas() -> dist.ProcessGroup:
    """Return the ranks that hold the same weights as this one."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    assert isinstance(group, dist.ProcessGroup), "every rank is in one"
    return group


def _model_key(chunk: int) -> str:
    """Return the name of a chunk's state; what is stored is named by the layer's number in the
    model, so chunks of one layout read what those of another have written."""
    return f"model{chunk}" if chunk else "model"


def _random_states() -> dict[str, Any]:
    tracker: Any = get_cuda_rng_tracker()
    return {
        "host": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "model_parallel": tracker.get_states(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    tracker: Any = get_cuda_rng_tracker()
    torch.set_rng_state(states["host"])
    torch.cuda.set_rng_state(states["device"])
    tracker.set_states(states["model_parallel"])
