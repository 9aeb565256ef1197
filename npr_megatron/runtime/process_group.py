"""Join and leave the trainer's process groups.

Whoever starts the process (torchrun, srun, a Ray actor, a test) says rank, world size and
rendezvous; nothing here reads the environment. Megatron-core keeps its groups in module state, so
a process is one trainer rank at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import ConfigError, EnvironmentFault
from npr_megatron.runtime.adam import install_adam
from npr_megatron.runtime.device import backend, device_type, install_cuda_stand_in
from npr_megatron.runtime.fused_kernels import fused_kernels, hide_unusable

_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """Place of one process in the trainer.

    Example: ``RankInfo(rank=1, world_size=4, init_method="tcp://10.0.0.3:29511", local_rank=1)``.
    """

    rank: int
    world_size: int
    init_method: str
    """``tcp://host:port`` or ``file:///path``, equal on every rank."""
    local_rank: int = 0
    """Index of this rank's GPU among those the process sees; unused on CPU."""
    num_threads: int = 1
    """Intra-op threads of this process; more than one per rank slowed small models down on CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlace:
    """Where a rank stands in the grid: tp fastest, then dp, then pp."""

    rank: int
    tp_rank: int
    dp_rank: int
    pp_rank: int
    is_first_stage: bool
    is_last_stage: bool

    @property
    def reports(self) -> bool:
        """Whether this rank speaks for its tokens: others of its tp group and pipeline do not."""
        return self.is_last_stage and self.tp_rank == 0


def start(info: RankInfo, parallel: ParallelConfig, *, seed: int = 1) -> RankPlace:
    """Join the world, build Megatron's groups and return this rank's place in them.

    Blocks until all ranks have joined. Call inside ``device_scope``. ``seed`` only feeds
    Megatron's RNG tracker: this project draws nothing on a trainer rank (no dropout; weights are
    always loaded).

    Raises:
        ConfigError: world size is not tp * cp * dp * pp.
        EnvironmentFault: this process already is a rank.
    """
    hide_unusable()
    from megatron.core import parallel_state, tensor_parallel

    if info.world_size != parallel.world_size:
        raise ConfigError(
            f"the trainer needs tp * cp * dp * pp = {parallel.world_size} ranks, "
            f"{info.world_size} were started; change [parallel] or the number of processes"
        )
    if dist.is_initialized():
        raise EnvironmentFault(
            "a trainer rank was to start, but this process already belongs to a process group; "
            "close it first or use a process of its own"
        )
    install_cuda_stand_in()
    if not fused_kernels().has_fused_adam:
        install_adam()
    torch.set_num_threads(info.num_threads)
    if device_type() == "cuda":
        torch.cuda.set_device(info.local_rank)
    dist.init_process_group(
        backend(),
        init_method=info.init_method,
        rank=info.rank,
        world_size=info.world_size,
        timeout=_TIMEOUT,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        virtual_pipeline_model_parallel_size=parallel.vpp_size if parallel.vpp_size > 1 else None,
        context_parallel_size=parallel.cp_size,
        expert_model_parallel_size=parallel.ep_size,
        expert_tensor_parallel_size=parallel.etp_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    return RankPlace(
        rank=info.rank,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        pp_rank=pp_rank,
        is_first_stage=pp_rank == 0,
        is_last_stage=pp_rank == parallel.pp_size - 1,
    )


def cpu_world() -> dist.ProcessGroup:
    """Return a group of all ranks that moves host memory. Collective; build it once and keep it."""
    if backend() == "gloo":
        group = dist.group.WORLD
    else:
        group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup), "start comes first"
    return group


def stop() -> None:
    """Leave all groups. Idempotent."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
