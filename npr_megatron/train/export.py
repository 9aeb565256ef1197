"""Gather the trainer's shards into one HF folder, over any number of nodes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from npr_megatron.config.model import ModelConfig
from npr_megatron.weights.checkpoints.hf import write_hf
from npr_megatron.weights.executors.process_group import exchange
from npr_megatron.weights.layouts import canonical_layout
from npr_megatron.weights.plans.plan import plan_transfer
from npr_megatron.weights.storages import empty_storages
from npr_megatron.weights.tiles import Layout

_TIMEOUT_S = 600.0


def export_hf(
    path: str | Path,
    model: ModelConfig,
    layout: Layout,
    storages: Mapping[str, Tensor],
    cpu_world: dist.ProcessGroup,
    *,
    source_folder: str | Path | None,
) -> None:
    """Write the model to ``path`` from rank 0; returns on every rank when it is complete.

    Collective over ``cpu_world``, whose ranks are those of ``layout``. Each element travels once;
    rank 0 holds the whole model in host memory.

    Args:
        storages: this rank's weights, as ``layout`` declares them.
        source_folder: tokenizer files and special token ids are copied from there.
    """
    rank, world_size = dist.get_rank(cpu_world), dist.get_world_size(cpu_world)
    whole = canonical_layout(model)
    on_cpu = {name: tensor.cpu() for name, tensor in storages.items()}
    dtype: torch.dtype = next(iter(on_cpu.values())).dtype
    gathered = empty_storages(whole.ranks[0], dtype) if rank == 0 else {}
    exchange(
        plan_transfer(layout, whole),
        source_processes=range(world_size),
        target_processes=[0],
        sources={rank: on_cpu},
        targets={0: gathered} if rank == 0 else {},
        dtype=dtype,
        process_group=cpu_world,
        timeout_s=_TIMEOUT_S,
    )
    if rank == 0:
        write_hf(path, model, gathered, source_folder=source_folder)
    dist.barrier(cpu_world)
