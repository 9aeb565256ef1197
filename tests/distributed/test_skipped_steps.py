"""A step whose numbers are wrong is left out, leaves no trace, and says where it went wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from npr_megatron.config.training import OptimizerConfig, ParallelConfig, TrainerConfig
from npr_megatron.train.step import StepBatch, StepResult
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import Job, open_rank, train
from tests.distributed.samples import step_batches

FIRST, SECOND, THIRD, FOURTH = step_batches("papo", 4)
LIMITS = TrainerConfig(max_logprob_gap=100.0, max_skips_in_row=2)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, warmup_steps=4, weight_decay=0.1)


def everything(trainer: Any) -> list[bytes]:
    """Return all that a step may change on this rank: weights, and the optimizer's state."""
    state = [
        tensor.contiguous().numpy().tobytes()
        for part in trainer._optimizer.chained_optimizers
        for moments in part.optimizer.state.values()
        for tensor in moments.values()
    ]
    counts = [
        str(group.get("step")).encode()
        for part in trainer._optimizer.chained_optimizers
        for group in part.optimizer.param_groups
    ]
    trainer.gather_weights()
    return [*(t.numpy().tobytes() for t in trainer.storages.values()), *state, *counts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """The steps of a rank, the bad one second, and whether that one left a trace."""

    results: list[StepResult]
    left_a_trace: bool
    end: dict[str, np.ndarray]


def step_around(
    rank: int,
    world_size: int,
    init_method: str,
    job: Job,
    plant: Callable[[Any, int], Callable[[], None]],
    bad: StepBatch,
) -> Seen:
    """Take a good step, one with a fault planted, and one after its removal."""
    trainer = open_rank(rank, world_size, init_method, job)
    results = [trainer.train_step(FIRST)]
    remove = plant(trainer, rank)
    before = everything(trainer)
    results.append(trainer.train_step(bad))
    left_a_trace = everything(trainer) != before
    remove()
    results.append(trainer.train_step(THIRD))
    trainer.gather_weights()
    end = {name: tensor.clone().numpy() for name, tensor in trainer.storages.items()}
    trainer.close()
    return Seen(results=results, left_a_trace=left_a_trace, end=end)


def weight_of_one_rank(trainer: Any, rank: int) -> Callable[[], None]:
    """Make one number of layer 2 infinite on rank 3: tensor rank 1 of the second stage."""
    return _overwrite(trainer, "decoder.layers.0.mlp.linear_fc1.weight" if rank == 3 else None)


def weight_behind_a_sum(trainer: Any, rank: int) -> Callable[[], None]:
    """The same where the product is summed over tensor ranks, so that both see it."""
    return _overwrite(trainer, "decoder.layers.1.mlp.linear_fc2.weight" if rank == 2 else None)


def _overwrite(trainer: Any, name: str | None) -> Callable[[], None]:
    if name is None:
        return lambda: None
    weight = dict(trainer._stage.chunks[0].named_parameters())[name].data
    value = weight[1, 1].clone()
    weight[1, 1] = math.inf
    return lambda: weight[1, 1].copy_(value) and None


def nothing(trainer: Any, rank: int) -> Callable[[], None]:
    """The fault is in the batch."""
    return lambda: None


def with_advantage(value: float, number: int) -> StepBatch:
    """Return the second batch with one advantage of microbatch ``number`` replaced."""
    microbatches = list(SECOND.microbatches)
    advantages = microbatches[number].advantages.copy()
    advantages.flat[np.flatnonzero(microbatches[number].labels >= 0)[0]] = value
    microbatches[number] = dataclasses.replace(microbatches[number], advantages=advantages)
    return dataclasses.replace(SECOND, microbatches=tuple(microbatches))


TP2_PP2 = ParallelConfig(tp_size=2, pp_size=2)
FAULTS = {
    "weight of one rank": (
        TP2_PP2,
        weight_of_one_rank,
        SECOND,
        "first seen on rank 3 in microbatch 0: the output of layer 2 (mlp.linear_fc1) is not "
        "finite; so are these weights: layer 2 (mlp.linear_fc1) weight on rank 3",
    ),
    "weight behind a sum": (
        TP2_PP2,
        weight_behind_a_sum,
        SECOND,
        "first seen on ranks 2, 3 in microbatch 0: the output of layer 3 (mlp.linear_fc2) is not "
        "finite; so are these weights: layer 3 (mlp.linear_fc2) weight on rank 2",
    ),
    "loss of a replica": (
        ParallelConfig(dp_size=2, overlap_data_parallel=True),
        nothing,
        with_advantage(math.inf, 3),
        "first seen on rank 1 in microbatch 3: the loss is not finite",
    ),
    "gradient": (
        ParallelConfig(pp_size=2, vpp_size=2),
        nothing,
        with_advantage(3e38, 2),
        "first seen on rank 1 in microbatch 2: the gradient of the output of layer 3 is not",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_step_is_skipped_named_and_forgotten(name, hf_folder, tmp_path):
    parallel, plant, bad, where = FAULTS[name]
    job = Job(hf_folder=hf_folder, parallel=parallel, trainer=LIMITS, optimizer=OPTIMIZER)
    ranks = run_ranks(step_around, parallel.world_size, tmp_path, job, plant, bad)
    for rank in ranks:
        good, skipped, later = rank.results
        assert skipped.skipped and not rank.left_a_trace
        assert where in skipped.fault, skipped.fault
        assert (skipped.fault, good, later) == (
            ranks[0].results[1].fault,
            ranks[0].results[0],
            ranks[0].results[2],
        )
        assert not later.skipped and math.isfinite(later.loss)
        rates = [result.learning_rate for result in rank.results]
        assert rates == pytest.approx([OPTIMIZER.learning_rate * n / 4 for n in (1, 2, 3)])


def step_without_guard(rank: int, world_size: int, init_method: str, job: Job) -> bool:
    """Return whether the weights are still numbers after a bad step that nobody judged."""
    from npr_megatron.train import guard

    blind: Any = guard.Guard
    blind.fault_of = lambda *_: ""
    seen = step_around(rank, world_size, init_method, job, nothing, with_advantage(3e38, 0))
    return all(np.isfinite(tensor).all() for tensor in seen.end.values())


def test_without_the_guard_one_bad_step_ruins_the_weights(hf_folder, tmp_path):
    job = Job(hf_folder=hf_folder, trainer=LIMITS, optimizer=OPTIMIZER)
    assert run_ranks(step_without_guard, 1, tmp_path, job) == [False]


def steps_until_it_ends(rank: int, world_size: int, init_method: str, job: Job) -> list[str]:
    """Return what each step said of itself, the last one by its error."""
    from npr_megatron.errors import DivergenceError

    trainer = open_rank(rank, world_size, init_method, job)
    said = []
    for batch in (with_advantage(math.nan, 0),) * 5:
        if not said:
            trainer.train_step(FIRST)
        try:
            said.append(trainer.train_step(batch).fault)
        except DivergenceError as error:
            said.append(f"ended: {error}")
            break
    trainer.close()
    return said


def test_too_many_skips_in_a_row_end_the_run_on_every_rank(hf_folder, tmp_path):
    job = Job(hf_folder=hf_folder, parallel=ParallelConfig(dp_size=2), trainer=LIMITS)
    first, second = run_ranks(steps_until_it_ends, 2, tmp_path, job)
    assert first == second
    *skipped, last = first
    assert len(skipped) == 2 and all("a step needs a finite loss" in each for each in skipped)
    assert last.startswith("ended: step 3: a step needs a finite loss, its sum is nan; first seen")
    assert "and the 2 before it were skipped (trainer.max_skips_in_row is 2)" in last


def forgetting_train(rank: int, world_size: int, init_method: str, job: Job) -> Any:
    """Train on after a checkpoint that forgets what the guard knew."""
    from npr_megatron.train import guard

    forgetful: Any = guard.Guard
    forgetful.restored = lambda limits, _: forgetful(limits=limits)
    return train(rank, world_size, init_method, job)


def test_a_resumed_run_skips_the_spike_that_the_unbroken_one_skips(hf_folder, tmp_path):
    limits = LIMITS.model_copy(update={"spike_factor": 20.0, "spike_window": 2})
    job = Job(hf_folder=hf_folder, trainer=limits, optimizer=OPTIMIZER)
    batches = (FIRST, SECOND, with_advantage(1e6, 0), FOURTH)
    (unbroken,) = run_ranks(train, 1, tmp_path, dataclasses.replace(job, batches=batches))
    _, _, spike, _ = unbroken.results
    assert spike.skipped and "trainer.spike_factor 20 times" in spike.fault
    saved = dataclasses.replace(job, batches=batches[:2], save_to=tmp_path / "saved")
    run_ranks(train, 1, tmp_path, saved)
    again = dataclasses.replace(job, batches=batches[2:], load_from=tmp_path / "saved")
    (resumed,) = run_ranks(train, 1, tmp_path, again)
    assert resumed.results == unbroken.results[2:]
    for name, tensor in unbroken.storages.items():
        np.testing.assert_array_equal(resumed.storages[name], tensor, err_msg=name)
    (forgetful,) = run_ranks(forgetting_train, 1, tmp_path, again)
    assert not forgetful.results[0].skipped
