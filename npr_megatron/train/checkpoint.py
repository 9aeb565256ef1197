"""Trainer checkpoints: written by all ranks, published atomically, readable under any layout.

A folder of checkpoints looks like this; ``latest`` names the one to resume from::

    checkpoints/
      latest                 text: step-00000012
      step-00000012/         torch_dist shards, and progress.json with what the caller handed in

Shards are written into a folder of another name that is renamed when complete, then ``latest`` is
replaced, then older checkpoints are removed: whenever the process dies, what ``latest`` names is
whole. The optimizer's state is stored fully reshardable, so TP, PP, VPP and DP may change in
between.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer import MegatronOptimizer

from npr_megatron.errors import InputError
from npr_megatron.model.gpt import BranchGPT
from npr_megatron.train.checkpoint_folder import LATEST, find_checkpoint

_PROGRESS = "progress.json"
_PARTIAL = ".partial-"


def save_checkpoint(
    folder: str | Path,
    step: int,
    chunks: Sequence[BranchGPT],
    optimizer: MegatronOptimizer,
    progress: dict[str, Any],
) -> Path:
    """Write and publish ``folder/step-<step>``; older checkpoints of ``folder`` are removed.

    Collective: every rank calls it with equal ``folder`` and ``step`` on a shared file system.
    ``progress`` of rank 0 is stored as JSON and comes back from :func:`load_checkpoint`.
    """
    folder = Path(folder)
    published = folder / f"step-{step:08d}"
    partial = folder / f"{_PARTIAL}{published.name}"
    is_writer = dist.get_rank() == 0
    if is_writer:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = _sharded_state(chunks, optimizer, step, is_loading=False)
    dist_checkpointing.save(state, str(partial))
    if is_writer:
        (partial / _PROGRESS).write_text(json.dumps(progress))
        _publish(partial, published)
    dist.barrier()
    return published


def load_checkpoint(
    folder: str | Path, chunks: Sequence[BranchGPT], optimizer: MegatronOptimizer
) -> tuple[int, dict[str, Any]]:
    """Restore model and optimizer in place; return the step and the stored progress.

    Collective. ``folder`` is a folder of checkpoints, of which the latest is read, or one
    checkpoint.

    Raises:
        InputError: there is no complete checkpoint.
    """
    path = find_checkpoint(folder) or Path(folder)
    if not (path / _PROGRESS).exists():
        raise InputError(
            f"a checkpoint was to be read from {folder}, which holds neither {LATEST} nor "
            f"{_PROGRESS}; name a folder that a trainer has saved to"
        )
    wanted = _sharded_state(chunks, optimizer, 0, is_loading=True)
    state: Any = dist_checkpointing.load(wanted, str(path))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state[_model_key(number)])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), json.loads((path / _PROGRESS).read_text())


def _sharded_state(
    chunks: Sequence[BranchGPT], optimizer: MegatronOptimizer, step: int, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    models = {
        _model_key(number): chunk.sharded_state_dict(metadata=metadata)
        for number, chunk in enumerate(chunks)
    }
    return {
        **models,
        "optimizer": optimizer.sharded_state_dict(models, is_loading=is_loading, metadata=metadata),
        "step": torch.tensor(step),
    }


def _model_key(chunk: int) -> str:
    """Return the name of a chunk's state; what is stored is named by the layer's number in the
    model, so chunks of one layout read what those of another have written."""
    return f"model{chunk}" if chunk else "model"


def _publish(partial: Path, published: Path) -> None:
    folder = published.parent
    shutil.rmtree(published, ignore_errors=True)
    partial.rename(published)
    pointer = folder / f"{_PARTIAL}{LATEST}"
    pointer.write_text(published.name)
    pointer.replace(folder / LATEST)
    for other in folder.glob("step-*"):
        if other != published:
            shutil.rmtree(other)
