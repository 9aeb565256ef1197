"""What ranks do in these tests. Only ranks import Megatron, so collecting stays fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import OptimizerConfig, ParallelConfig, TrainerConfig
from npr_megatron.train.step import StepBatch, StepResult
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.names import canonical_parameters
from npr_megatron.weights.storages import empty_storages

MODEL = ModelConfig(
    num_hidden_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=48,
    vocab_size=64,
    tie_word_embeddings=True,
)
ONE_RANK = ParallelConfig()
TRAINER = TrainerConfig(max_logprob_gap=100.0)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, warmup_steps=2, clip_grad=0.5)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One trainer's life: load, maybe resume, train, maybe save."""

    hf_folder: Path
    model: ModelConfig = MODEL
    parallel: ParallelConfig = ONE_RANK
    trainer: TrainerConfig = TRAINER
    optimizer: OptimizerConfig = OPTIMIZER
    num_steps: int = 10
    load_from: Path | None = None
    batches: tuple[StepBatch, ...] = ()
    save_to: Path | None = None
    score: tuple[StepBatch, ...] = ()
    publish: int | None = None
    export_to: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rank saw, and what it held at the end."""

    results: list[StepResult] = field(default_factory=list)
    storages: dict[str, np.ndarray] = field(default_factory=dict)
    progress: dict[str, Any] | None = None
    logprobs: list[list[np.ndarray]] = field(default_factory=list)
    received: dict[str, np.ndarray] = field(default_factory=dict)


def open_rank(rank: int, world_size: int, init_method: str, job: Job) -> Any:
    """Return a trainer rank with weights loaded and a stage begun."""
    from npr_megatron.train.rank import RankInfo, TrainerRank

    info = RankInfo(rank=rank, world_size=world_size, init_method=init_method)
    trainer = TrainerRank(
        info,
        model=job.model,
        parallel=job.parallel,
        trainer=job.trainer,
        run_id="test",
        arena_dir=str(job.hf_folder),
    )
    trainer.load_hf(job.hf_folder)
    trainer.begin_stage(job.optimizer, job.num_steps)
    return trainer


def train(rank: int, world_size: int, init_method: str, job: Job) -> Outcome:
    """Do the whole job."""
    trainer = open_rank(rank, world_size, init_method, job)
    progress = trainer.load(job.load_from) if job.load_from else None
    results = [trainer.train_step(batch) for batch in job.batches]
    if job.save_to:
        trainer.save(job.save_to, {"trained": len(results)})
    if job.export_to:
        trainer.export_hf(job.export_to)
    trainer.gather_weights()
    outcome = Outcome(
        results=results,
        storages={name: tensor.clone().numpy() for name, tensor in trainer.storages.items()},
        progress=progress,
        logprobs=[trainer.score(batch) for batch in job.score],
        received=_received(trainer, world_size, job) if job.publish is not None else {},
    )
    trainer.close()
    return outcome


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Log-probs of a batch, and what the trainer's gate said of a step."""

    logprobs: list[np.ndarray]
    result: StepResult | None
    refusal: str


def score_then_step(rank: int, world_size: int, init_method: str, job: Job) -> Measured:
    """Score the job's one batch to score, then take one step on its one batch."""
    from npr_megatron.errors import DivergenceError

    (to_score,), (to_learn,) = job.score, job.batches
    trainer = open_rank(rank, world_size, init_method, job)
    logprobs = trainer.score(to_score)
    result, refusal = None, ""
    try:
        result = trainer.train_step(to_learn)
    except DivergenceError as error:
        refusal = str(error)
    trainer.close()
    return Measured(logprobs=logprobs, result=result, refusal=refusal)


def _received(trainer: Any, world_size: int, job: Job) -> dict[str, np.ndarray]:
    """Publish from every rank and pull the engine's storages on this one; digests are checked."""
    import torch
    import torch.distributed as dist

    from npr_megatron.weights.executors.shared_memory import Receiver
    from npr_megatron.weights.publication import Publication

    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, trainer.publish(job.publish))
    engine = engine_layout(job.model)
    staging = empty_storages(engine.ranks[0], torch.float32)
    receiver = Receiver(trainer_layout(job.model, job.parallel), engine)
    receiver.pull(Publication.assemble(parts), staging)
    receiver.close()
    dist.barrier()
    return {name: tensor.numpy() for name, tensor in staging.items()}


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """The steps of a rank, the gradient of the first one, and what it held after the last."""

    results: list[StepResult]
    gradients: dict[str, np.ndarray]
    storages: dict[str, np.ndarray]


def learn(
    rank: int,
    world_size: int,
    init_method: str,
    job: Job,
    fault: Callable[[], None] | None = None,
) -> Learnt:
    """Take the job's steps; ``fault`` breaks something in this process before the rank is built."""
    return learn_one_by_one(rank, world_size, init_method, job, (job.batches,), fault)[0]


def learn_one_by_one(
    rank: int,
    world_size: int,
    init_method: str,
    job: Job,
    lives: tuple[tuple[StepBatch, ...], ...],
    fault: Callable[[], None] | None = None,
) -> list[Learnt]:
    """Take the steps of each life, every one from the job's weights."""
    from npr_megatron.train import rank as rank_module

    gradients: dict[str, np.ndarray] = {}
    take_step = rank_module.take_step

    def look_then_step(*arguments: Any) -> None:
        if not gradients:
            gradients.update(_gradients(trainer))
        take_step(*arguments)

    rank_module.take_step = look_then_step
    _use_small_buckets()
    if fault is not None:
        fault()
    trainer = open_rank(rank, world_size, init_method, job)
    learnt: list[Learnt] = []
    for number, batches in enumerate(lives):
        if number:
            trainer.load_hf(job.hf_folder)
            trainer.begin_stage(job.optimizer, job.num_steps)
        gradients.clear()
        results = [trainer.train_step(batch) for batch in batches]
        trainer.gather_weights()
        storages = {name: tensor.clone().numpy() for name, tensor in trainer.storages.items()}
        learnt.append(Learnt(results=results, gradients=dict(gradients), storages=storages))
    trainer.close()
    return learnt


def _use_small_buckets() -> None:
    """Cut gradient and weight buffers into many buckets, as they are cut in large models."""
    import dataclasses

    from npr_megatron.model import build

    original = build.ddp_config
    build.ddp_config = lambda *sections: dataclasses.replace(original(*sections), bucket_size=4000)


def _gradients(trainer: Any) -> dict[str, np.ndarray]:
    """Return the summed gradient of this rank's weights: each replica has a share of it only."""
    import torch.distributed as dist

    from npr_megatron.model.storages import stage_parameters

    for wrapped in trainer._stage.wrapped:
        for buffers, group in (
            (wrapped.buffers, wrapped.intra_dp_cp_group),
            (wrapped.expert_parallel_buffers, wrapped.intra_expt_dp_group),
        ):
            for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
                own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)
    parameters: Any = stage_parameters(trainer._stage.chunks)
    return {name: parameter.main_grad.clone().numpy() for name, parameter in parameters.items()}


def whole_model(
    per_rank: list[dict[str, np.ndarray]], model: ModelConfig, parallel: ParallelConfig
) -> dict[str, np.ndarray]:
    """Return canonical tensors from what the ranks hold; replicas must be equal bit by bit."""
    layout = trainer_layout(model, parallel)
    tensors = {
        parameter.name: np.full(parameter.shape, np.nan, np.float32)
        for parameter in canonical_parameters(model)
    }
    for rank_layout, held in zip(layout.ranks, per_rank, strict=True):
        for tile in rank_layout.tiles:
            target = tensors[tile.parameter][tile.box.slices]
            values = held[tile.storage][tile.storage_box.slices]
            is_equal = np.isnan(target).all() or np.array_equal(target, values)
            assert is_equal, f"replicas differ: {tile}"
            target[...] = values
    return tensors


def check_weights(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Require equal weights but for rounding: 1e-5 of a tensor's norm, 1e-4 in a single element.

    Adam divides a gradient by its size, so where one nearly vanishes its rounding moves a weight as
    far as another gradient does.
    """
    for name, tensor in expected.items():
        distance = np.linalg.norm(found[name] - tensor) / np.linalg.norm(tensor)
        assert distance <= 1e-5, f"{name} is {distance:.1e} of its norm away"
        np.testing.assert_allclose(found[name], tensor, atol=1e-4, err_msg=name)
