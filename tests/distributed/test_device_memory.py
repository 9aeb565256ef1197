"""The memory that the checker estimates is what a rank really keeps."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from npr_megatron.config.device_memory import _num_waiting, rank_memory
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import LossConfig, ParallelConfig, TrainerConfig
from npr_megatron.train.step import StepBatch
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import Job, open_rank
from tests.distributed.models import write_model
from tests.distributed.samples import packed

MODEL = ModelConfig(
    num_hidden_layers=4,
    hidden_size=64,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    intermediate_size=192,
    vocab_size=64,
)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes a rank kept during its first step."""

    gradients: int
    optimizer: int
    activations: int


def measure(rank, world_size, init_method, job):
    import torch

    trainer = open_rank(rank, world_size, init_method, job)
    length = job.trainer.row_tokens
    weights = {tensor.untyped_storage().data_ptr() for tensor in trainer.storages.values()}
    saved = {}  # holds what it counts, or a freed address would be counted for two

    def save(tensor):
        if torch._C._current_graph_task_id() != -1:
            return tensor  # computed again, in backward: the workspace, not what waits
        storage = tensor.untyped_storage()
        is_mask = tensor.ndim == 4 and tensor.shape[1] == 1 and tensor.shape[-1] == length
        if tensor.is_floating_point() and not is_mask and storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        trainer.train_step(job.batches[0])
    (part,) = trainer._optimizer.chained_optimizers
    moments = [t for state in part.optimizer.state.values() for t in state.values()]
    kept = Kept(
        gradients=sum(buffer.grad_data.nbytes for buffer in trainer._stage.wrapped[0].buffers),
        optimizer=sum(moment.nbytes for moment in moments),
        activations=sum(storage.nbytes() for storage in saved.values()),
    )
    trainer.close()
    return kept


@pytest.mark.parametrize(
    ("parallel", "recompute"),
    [
        (ParallelConfig(), "none"),
        (ParallelConfig(tp_size=2), "none"),
        (ParallelConfig(dp_size=2), "none"),
        (ParallelConfig(cp_size=2), "none"),
        (ParallelConfig(), "selective"),
        (ParallelConfig(tp_size=2), "full"),
        (ParallelConfig(cp_size=2), "selective"),
    ],
    ids=["one rank", "tp2", "dp2", "cp2", "selective", "full tp2", "selective cp2"],
)
def test_the_estimate_is_what_a_rank_keeps(parallel, recompute, tmp_path):
    batches = packed(
        0, num_samples=8, rows_per_microbatch=8 // parallel.dp_size, num_replicas=parallel.dp_size
    )
    assert len(batches) == parallel.dp_size
    rows, length = batches[0].shape
    trainer = TrainerConfig(
        row_tokens=length, rows_per_microbatch=rows, max_logprob_gap=100.0, recompute=recompute
    )
    job = Job(
        hf_folder=write_model(tmp_path / "model", MODEL),
        model=MODEL,
        parallel=parallel,
        trainer=trainer,
        batches=(StepBatch(microbatches=batches, loss=LossConfig(kind="sft")),),
    )
    kept = run_ranks(measure, parallel.world_size, tmp_path, job)
    estimate = rank_memory(MODEL, parallel, trainer, 0)
    together = sum(rank.optimizer for rank in kept)
    assert together == pytest.approx(estimate.optimizer * len(kept), rel=0.01)
    for rank in kept:
        assert rank.gradients == pytest.approx(estimate.gradients, rel=0.02)  # buffers are padded
        assert rank.activations == pytest.approx(estimate.activations, rel=0.1)


SCHEDULES = [(pp, vpp) for pp in (1, 2, 4) for vpp in (1, 2, 3) if vpp == 1 or pp > 1]


def waiting_in_megatron(rank, world_size, init_method):
    """Return how many chunks Megatron has forwarded when the first backward begins."""
    from types import SimpleNamespace

    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    def waiting(pp, vpp, stage):
        group = SimpleNamespace(size=lambda: pp, rank=lambda: stage)
        stages = SimpleNamespace(
            pp_group=group, virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None
        )
        *_, num_warmup, _ = get_pp_rank_microbatches(8 * pp, vpp, pp, p2p_communicator=stages)
        return num_warmup + 1

    return {(pp, vpp, s): waiting(pp, vpp, s) for pp, vpp in SCHEDULES for s in range(pp)}


def test_as_many_chunks_wait_as_megatron_lets_wait(tmp_path):
    (theirs,) = run_ranks(waiting_in_megatron, 1, tmp_path)
    for (pp, vpp, stage), count in theirs.items():
        parallel = ParallelConfig(pp_size=pp, vpp_size=vpp)
        assert _num_waiting(parallel, stage) == count, (pp, vpp, stage)
