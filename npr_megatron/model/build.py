"""Build this rank's stage of the model, wrapped for data-parallel training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed import ProcessGroup

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig, TrainerConfig
from npr_megatron.model.gpt import BranchGPT
from npr_megatron.model.spec import block_spec
from npr_megatron.model.transformer_config import ddp_config, transformer_config
from npr_megatron.records.trajectory import IntArray
from npr_megatron.runtime.device import current_device
from npr_megatron.runtime.process_group import RankPlace
from npr_megatron.topology.context_slices import own_columns
from npr_megatron.weights.storages import DTYPES


@dataclass(frozen=True, slots=True)
class Stage:
    """A rank's share of the model: one chunk, or several where the schedule is interleaved."""

    chunks: tuple[BranchGPT, ...]
    """In the order in which they run."""
    wrapped: tuple[DistributedDataParallel, ...]
    """The same chunks, in the same order, as Megatron trains them."""
    model: ModelConfig
    dtype: torch.dtype
    cp_group: ProcessGroup
    """The ranks that share this rank's rows."""

    def own_columns(self, length: int) -> IntArray:
        """Return the offsets in a row of ``length`` tokens that this rank computes."""
        return own_columns(length, self.cp_group.rank(), self.cp_group.size())


def build_stage(
    model: ModelConfig, parallel: ParallelConfig, trainer: TrainerConfig, place: RankPlace
) -> Stage:
    """Return this rank's stage.

    Its parameters are uninitialised until weights are loaded. Needs the process groups of
    ``runtime.process_group.start``; call inside ``device_scope``.
    """
    config: TransformerConfig = transformer_config(model, parallel, trainer)
    chunks = tuple(
        _build_chunk(model, parallel, config, place, number) for number in range(parallel.vpp_size)
    )
    wrapped = tuple(
        DistributedDataParallel(
            config,
            ddp_config(parallel, trainer),
            Float16Module(config, chunk) if config.bf16 else chunk,
            # Later chunks communicate while others compute; one message each is enough.
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    )
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_data_parallel:
        # Gradients are reduced in the backward of the last microbatch only.
        pauses: Any = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = pauses if len(wrapped) > 1 else pauses[0]
    cp_group = parallel_state.get_context_parallel_group()
    assert isinstance(cp_group, ProcessGroup), "every rank is in one"
    return Stage(chunks, wrapped, model, DTYPES[trainer.dtype], cp_group)


def _build_chunk(
    model: ModelConfig,
    parallel: ParallelConfig,
    config: TransformerConfig,
    place: RankPlace,
    number: int,
) -> BranchGPT:
    """Return chunk ``number``: the embedding is in the first of the first stage, the head in the
    last of the last."""
    virtual = number if parallel.vpp_size > 1 else None
    return BranchGPT(
        model,
        parallel,
        config,
        transformer_layer_spec=block_spec(config, virtual),
        pre_process=place.is_first_stage and number == 0,
        post_process=place.is_last_stage and number == parallel.vpp_size - 1,
        vp_stage=virtual,
    ).to(current_device())
