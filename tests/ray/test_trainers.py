"""Real Megatron ranks in Ray actors: a step of learning, and weights that reach the engines."""

import itertools
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from npr_megatron.config.engine import EngineConfig, FleetConfig
from npr_megatron.config.training import LossConfig, OptimizerConfig, ParallelConfig, TrainerConfig
from npr_megatron.data.packing import pack
from npr_megatron.data.samples import rl_sample
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.errors import ConfigError, DivergenceError, EnvironmentFault, InputError
from npr_megatron.launch.trainers import TrainerGroup
from npr_megatron.records.trajectory import DecodeMode, Trajectory
from npr_megatron.rollout.fleet import Fleet
from npr_megatron.train.step import StepBatch
from npr_megatron.weights.checkpoints.hf import read_hf, write_hf
from npr_megatron.weights.executors.shared_memory import Receiver
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.storages import empty_storages, load_tiles
from tests.engines import TINY, request_for
from tests.ray.conftest import PARALLEL, made_up_weights
from tests.structures import SMALL

pytestmark = pytest.mark.slow
REQUESTS = [
    request_for(
        (20, 21 + prompt),
        prompt_id=f"p{prompt}",
        mode=DecodeMode.SEQUENTIAL,
        seed=prompt,
        max_new_tokens=40,
        max_critical_path=40,
    )
    for prompt in range(8)
]


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "start"
    write_hf(folder, TINY, made_up_weights(2))
    return folder


@pytest.fixture(scope="module")
def arena_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trainer-arenas")


@pytest.fixture(scope="module")
def trainer(cluster, arena_dir, hf_folder):
    """Two pipeline stages with the starting weights."""
    with TrainerGroup(
        cluster.trainer_seats,
        model=TINY,
        parallel=PARALLEL,
        trainer=TrainerConfig(row_tokens=512, max_logprob_gap=1e-4),
        run_id="ray-test",
        arena_dir=str(arena_dir),
    ) as trainer:
        trainer.load_hf(hf_folder)
        yield trainer


@pytest.fixture(scope="module")
def fleet(cluster, trainer):
    config = FleetConfig(num_replicas=2)
    source = trainer_layout(TINY, PARALLEL)
    with Fleet(cluster.replica_seats, TINY, EngineConfig(), config, SMALL, source=source) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def versions():
    """Weight versions, each used once."""
    return itertools.count(1)


def batch_of(trajectories: list[Trajectory]) -> StepBatch:
    """A DAPO batch that likes every other trajectory."""
    samples = [rl_sample(t, advantage=1.0 - 2 * (i % 2)) for i, t in enumerate(trajectories)]
    return StepBatch(microbatches=pack(samples, 512, 2, 1), loss=LossConfig(kind="dapo"))


def engine_storages(folder: Path) -> dict[str, torch.Tensor]:
    """Engine storages cut from an HF folder, past publisher, arenas and plan."""
    (layout,) = engine_layout(TINY).ranks
    storages = empty_storages(layout, torch.float32)
    load_tiles(layout, read_hf(folder, TINY).read, storages)
    return storages


def test_learnt_weights_reach_the_engines_bit_for_bit(
    trainer, fleet, versions, hf_folder, tmp_path
):
    fleet.push(trainer.publish(next(versions)))
    before = fleet.generate(REQUESTS)

    trainer.begin_stage(OptimizerConfig(learning_rate=1e-2), num_steps=2)
    result = trainer.train_step(batch_of(before))
    assert result.num_loss_tokens == sum(t.num_tokens for t in before)
    assert result.grad_norm > 0
    assert 0 < result.max_logprob_gap < 1e-4  # the engine's log-probs, recomputed by Megatron

    publication = trainer.publish(next(versions))
    pulled = empty_storages(engine_layout(TINY).ranks[0], torch.float32)
    Receiver(trainer_layout(TINY, PARALLEL), engine_layout(TINY)).pull(publication, pulled)
    trainer.export_hf(tmp_path / "learnt", hf_folder)
    learnt, start = engine_storages(tmp_path / "learnt"), engine_storages(hf_folder)
    for name, storage in pulled.items():
        assert torch.equal(storage, learnt[name]), name
        assert not torch.equal(storage, start[name]), name

    fleet.push(publication)
    oracle = EmbeddedEngine(TINY, EngineConfig(), SMALL)
    oracle.load(learnt, version=publication.version)
    for found, expected in zip(fleet.generate(REQUESTS), oracle.generate(REQUESTS), strict=True):
        np.testing.assert_array_equal(found.token_ids, expected.token_ids)
        np.testing.assert_array_equal(found.weight_versions, expected.weight_versions)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


def test_progress_comes_back_from_a_checkpoint_and_scores_are_those_of_the_rollouts(
    trainer, fleet, versions, tmp_path
):
    trainer.begin_stage(OptimizerConfig(learning_rate=1e-2), num_steps=3)
    fleet.push(trainer.publish(next(versions)))
    batch = batch_of(fleet.generate(REQUESTS))
    scores = trainer.score(batch)
    for microbatch, score in zip(batch.microbatches, scores, strict=True):
        learnt = microbatch.labels >= 0
        np.testing.assert_allclose(
            score[learnt], microbatch.rollout_logprobs[learnt], atol=1e-4, rtol=0
        )
    imitation = StepBatch(microbatches=batch.microbatches, loss=LossConfig(kind="sft"))
    trainer.train_step(imitation)
    trainer.save(tmp_path / "checkpoints", {"stage": "zero", "step": 1})
    second = trainer.train_step(imitation)
    trainer.begin_stage(OptimizerConfig(learning_rate=1e-2), num_steps=3)
    assert trainer.load(tmp_path / "checkpoints") == {"stage": "zero", "step": 1}
    assert trainer.train_step(imitation) == second


def test_errors_of_ranks_keep_their_type_and_the_group_stays_usable(
    trainer, fleet, versions, tmp_path
):
    with pytest.raises(InputError, match="nowhere"):
        trainer.load_hf(tmp_path / "nowhere")
    fleet.push(trainer.publish(next(versions)))
    trajectories = fleet.generate(REQUESTS)
    batch = batch_of(trajectories)
    for microbatch in batch.microbatches:
        microbatch.rollout_logprobs[microbatch.labels >= 0] -= 1.0
    trainer.begin_stage(OptimizerConfig(learning_rate=1e-2), num_steps=2)
    with pytest.raises(DivergenceError, match="max_logprob_gap"):
        trainer.train_step(batch)
    assert trainer.train_step(batch_of(trajectories)).max_logprob_gap < 1e-4


def test_the_number_of_seats_must_be_the_number_of_ranks(cluster):
    with pytest.raises(ConfigError, match="4 seats, 2 were placed"):
        TrainerGroup(
            cluster.trainer_seats,
            model=TINY,
            parallel=ParallelConfig(pp_size=2, dp_size=2),
            trainer=TrainerConfig(),
            run_id="wrong",
            arena_dir="unused",
        )


def test_a_killed_rank_ends_the_group_with_its_name_and_frees_its_memory(
    trainer, fleet, versions, arena_dir
):
    """Last of the file: the trainer does not survive it."""
    trainer.begin_stage(OptimizerConfig(learning_rate=1e-2), num_steps=2)
    fleet.push(trainer.publish(next(versions)))
    batch = batch_of(fleet.generate(REQUESTS))
    assert len(list(arena_dir.iterdir())) == 2
    os.kill(trainer.pids[1], signal.SIGKILL)
    with pytest.raises(EnvironmentFault, match="rank 1 is gone"):
        trainer.train_step(batch)
    assert list(arena_dir.iterdir()) == []
    with pytest.raises(EnvironmentFault, match="has ended"):
        trainer.publish(99)
