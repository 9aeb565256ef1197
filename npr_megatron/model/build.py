"""Build this rank's stage of the model, wrapped for data-parallel training."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.model.gpt import BranchGPT
from npr_megatron.model.spec import block_spec
from npr_megatron.model.transformer_config import ddp_config, transformer_config
from npr_megatron.runtime.device import current_device, device_type
from npr_megatron.runtime.process_group import RankPlace


def build_stage(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, place: RankPlace
) -> tuple[BranchGPT, DistributedDataParallel]:
    """Return this rank's stage and the same stage wrapped for training.

    Its parameters are uninitialised until weights are loaded. Needs the process groups of
    ``runtime.process_group.start``; call inside ``device_scope``.
    """
    config: TransformerConfig = transformer_config(model, parallel, dtype)
    stage = BranchGPT(
        model,
        config,
        transformer_layer_spec=block_spec(config, device_type()),
        pre_process=place.is_first_stage,
        post_process=place.is_last_stage,
    ).to(current_device())
    module = Float16Module(config, stage) if config.bf16 else stage
    return stage, DistributedDataParallel(config, ddp_config(), module)
