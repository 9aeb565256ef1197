"""The same optimizer wherever its state is kept; and what it decays."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

from npr_megatron.config.training import OptimizerConfig, ParallelConfig
from npr_megatron.train.step import StepResult
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import TRAINER, Job, train
from tests.distributed.samples import step_batches

DP2 = ParallelConfig(dp_size=2)
BATCHES = step_batches("papo", 4)
FRACTIONS = (0.0, 0.5, 1.0)


def offloading(job: Job, frac: float, **changes: Any) -> Job:
    """Return ``job`` in bf16, with a share of the optimizer on the CPU."""
    numerics = {"dtype": "bf16", "optimizer_offload_frac": frac}
    trainer = job.trainer.model_copy(update=numerics)
    return dataclasses.replace(job, trainer=trainer, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """Steps of a rank, its weights after the last, and the kinds of optimizers that took them."""

    results: list[StepResult]
    weights: dict[str, np.ndarray]
    kinds: list[str]


def train_all(rank: int, world_size: int, init_method: str, jobs: list[Job]) -> list[Done]:
    """Return what became of jobs done one after another."""
    from tests.distributed.jobs import open_rank

    done = []
    for number, job in enumerate(jobs):
        trainer = open_rank(rank, world_size, f"{init_method}-{number}", job)
        if job.load_from:
            trainer.load(job.load_from)
        results = [trainer.train_step(batch) for batch in job.batches]
        if job.save_to:
            trainer.save(job.save_to, {})
        inner = [part.optimizer for part in trainer._optimizer.chained_optimizers]
        parts = [part for each in inner for part in getattr(each, "sub_optimizers", [each])]
        weights = {name: tensor.float().numpy() for name, tensor in trainer.storages.items()}
        kinds = sorted({type(part).__name__ for part in parts})
        trainer.close()
        done.append(Done(results=results, weights=weights, kinds=kinds))
    return done


def require_equal(found: Done, expected: Done, num_steps: int) -> None:
    """Require the same last steps and the same weights, bit by bit: only the place differs."""
    assert found.results[-num_steps:] == expected.results[-num_steps:]
    for name, tensor in expected.weights.items():
        np.testing.assert_array_equal(found.weights[name], tensor, err_msg=name)


def test_an_offloaded_state_is_the_same_state(hf_folder, tmp_path):
    job = Job(hf_folder=hf_folder, parallel=DP2, batches=BATCHES)
    for rank in run_ranks(train_all, 2, tmp_path, [offloading(job, frac) for frac in FRACTIONS]):
        assert [done.kinds for done in rank] == [
            ["FusedLayoutAdam"],
            ["AdamW", "FusedLayoutAdam"],
            ["AdamW"],
        ]
        for done in rank[1:]:
            require_equal(done, rank[0], 4)


def test_a_run_goes_on_with_another_share_offloaded(hf_folder, tmp_path):
    job = Job(hf_folder=hf_folder, parallel=DP2, batches=BATCHES)
    jobs = [offloading(job, 0.0)]
    for number, (before, after) in enumerate(((0.5, 0.0), (0.0, 0.5), (0.5, 1.0))):
        folder = tmp_path / f"saved-{number}"
        jobs.append(offloading(job, before, batches=BATCHES[:2], save_to=folder))
        jobs.append(offloading(job, after, batches=BATCHES[2:], load_from=folder))
    for rank in run_ranks(train_all, 2, tmp_path, jobs):
        unbroken, *pairs = rank
        for resumed in pairs[1::2]:
            require_equal(resumed, unbroken, 2)


def steps_without_count(
    rank: int, world_size: int, init_method: str, jobs: list[Job]
) -> list[Done]:
    """The same where nobody counts the steps of the device's part."""
    from npr_megatron.train import optimizer

    optimizer.count_offloaded_step = lambda _: None
    return train_all(rank, world_size, init_method, jobs)


def test_a_lost_count_of_steps_shows(hf_folder, tmp_path):
    job = Job(hf_folder=hf_folder, batches=BATCHES[:2])
    jobs = [offloading(job, frac) for frac in (0.0, 0.5)]
    ((whole, half),) = run_ranks(steps_without_count, 1, tmp_path, jobs)
    with pytest.raises(AssertionError):
        require_equal(half, whole, 2)


def places_of_moments(rank: int, world_size: int, init_method: str, job: Job) -> set[str]:
    """Return the kinds of devices that hold moments after a step."""
    from tests.distributed.jobs import open_rank

    trainer = open_rank(rank, world_size, init_method, job)
    trainer.train_step(job.batches[0])
    optimizer = trainer._optimizer
    assert optimizer is not None
    kinds = {
        state["exp_avg"].device.type
        for part in optimizer.chained_optimizers
        for state in part.optimizer.state.values()
    }
    trainer.close()
    return kinds


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded_moments_lie_in_the_memory_of_the_cpu(hf_folder, tmp_path):
    job = Job(hf_folder=hf_folder, batches=BATCHES[:1])
    found = [
        run_ranks(places_of_moments, 1, tmp_path, offloading(job, frac))[0] for frac in FRACTIONS
    ]
    assert found == [{"cuda"}, {"cuda", "cpu"}, {"cpu"}]


def save_unmoved(rank: int, world_size: int, init_method: str, job: Job) -> bool:
    """Save and restore before the first step; return whether the weights are what they were."""
    from tests.distributed.jobs import open_rank

    trainer = open_rank(rank, world_size, init_method, job)
    before = {name: tensor.clone() for name, tensor in trainer.storages.items()}
    trainer.save(job.save_to, {})
    trainer.load(job.save_to)
    is_same = all(tensor.equal(trainer.storages[name]) for name, tensor in before.items())
    trainer.close()
    return is_same


def test_an_offloaded_stage_may_be_saved_before_its_first_step(hf_folder, tmp_path):
    job = offloading(Job(hf_folder=hf_folder, save_to=tmp_path / "saved"), 0.5)
    assert run_ranks(save_unmoved, 1, tmp_path, job) == [True]


def decay_alone(rank: int, world_size: int, init_method: str, job: Job) -> dict[str, np.ndarray]:
    """Return by how much each weight shrank in a step, beside its gradient's part in it."""
    outcomes = []
    for number, decay in enumerate((0.0, 0.5)):
        optimizer = OptimizerConfig(learning_rate=0.1, weight_decay=decay)
        outcomes.append(
            train(
                rank,
                world_size,
                f"{init_method}-{number}",
                dataclasses.replace(job, optimizer=optimizer),
            ).storages
        )
    return {name: outcomes[0][name] - outcomes[1][name] for name in outcomes[0]}


def test_weight_decay_spares_norms_and_nothing_else(hf_folder, tmp_path):
    job = Job(hf_folder=hf_folder, trainer=TRAINER, batches=BATCHES[:1])
    (shrunk,) = run_ranks(decay_alone, 1, tmp_path, job)
    assert {name for name, change in shrunk.items() if not change.any()} == {
        name for name in shrunk if "norm" in name
    }


def open_with_muon(rank: int, world_size: int, init_method: str, job: Job) -> str:
    """Return why a rank with Muon does not start where its package is not."""
    from npr_megatron.errors import EnvironmentFault
    from tests.distributed.jobs import open_rank

    try:
        open_rank(rank, world_size, init_method, job).close()
    except EnvironmentFault as error:
        return str(error)
    return ""


@pytest.mark.skipif(
    importlib.util.find_spec("emerging_optimizers") is not None, reason="the package is here"
)
def test_muon_without_its_package_is_refused_before_the_ranks_meet(hf_folder, tmp_path):
    trainer = TRAINER.model_copy(update={"optimizer": "muon"})
    job = Job(hf_folder=hf_folder, trainer=trainer, parallel=DP2)  # the second rank never comes
    (refusal,) = run_ranks(open_with_muon, 1, tmp_path, job, timeout_s=20)
    assert "finds no package emerging_optimizers; install" in refusal
