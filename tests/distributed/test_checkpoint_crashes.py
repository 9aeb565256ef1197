"""``kill -9`` at any point of a save loses nothing: the run goes on bit by bit from what is there.

A save asks some hundreds of things of the file system; a process is killed at one of them, half-way
through where it writes. Writers are killed alone, as the kernel does for want of memory, and all
processes of a job at once, as a power cut does.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from dataclasses import dataclass, replace

import numpy as np
import pytest

from npr_megatron.config.training import ParallelConfig
from npr_megatron.train.checkpoint_folder import find_checkpoint
from tests.distributed.harness import forks, run_ranks
from tests.distributed.jobs import Job, open_rank
from tests.distributed.samples import step_batches
from tests.distributed.strikes import Strikes, kill_group

BATCHES = [replace(batch, microbatches=batch.microbatches[:2]) for batch in step_batches("sft", 4)]
NUM_POWER_CUTS = 4


@dataclass(frozen=True, kw_only=True)
class Survival:
    """What came of one kill, as one rank saw it."""

    at: int
    was_struck: bool
    found: int
    """Step of the checkpoint that was there afterwards."""
    is_as_unbroken: bool


def held(trainer):
    return {name: tensor.clone() for name, tensor in trainer.storages.items()}


def go_on(trainer, folder):
    """Load, take the next step, return the step loaded and all that the run then is."""
    found = trainer.load(folder)["trained"]
    return found, (trainer.train_step(BATCHES[found]), held(trainer))


def equal(one, other):
    return one[0] == other[0] and all((one[1][name] == other[1][name]).all() for name in one[1])


def killed_writers(rank, world_size, init_method, job, folder, victim, num_kills):
    """Save step 3 over and over, kill the writer of rank ``victim`` and go on from what is there;
    return what came of it, and the names that are there after a last whole save."""
    trainer = open_rank(rank, world_size, init_method, job)
    before, whole = folder / "before", folder / "whole"
    unbroken = {}
    for number, batch in enumerate(BATCHES, start=1):
        unbroken[number] = trainer.train_step(batch), held(trainer)
        if number in (2, 3):
            trainer.save(before if number == 2 else whole, {"trained": number})
    assert not equal(unbroken[3], unbroken[4]), "what was not learnt would pass"
    strikes = Strikes()

    def save_third(where, at):
        if rank == 0:
            shutil.copytree(before, where)
        trainer.load(whole)
        strikes.arm(at if rank == victim else None)
        trainer.save(where, {"trained": 3})
        trainer._checkpoints.finish()
        return strikes.count

    total = save_third(folder / "counted", None)
    points = pick_points(strikes.calls, total, num_kills) if rank == victim else []
    survivals, where = [], folder / "counted"
    for at in share(points, victim):
        where = folder / f"at-{at}"
        was_struck = save_third(where, at) >= at
        found, now = go_on(trainer, where)
        is_as_unbroken = equal(now, unbroken[found + 1])
        survivals.append(
            Survival(at=at, was_struck=was_struck, found=found, is_as_unbroken=is_as_unbroken)
        )
    strikes.arm(None)
    trainer.save(where, {"trained": 4})
    trainer.close()
    return survivals, sorted(path.name for path in where.iterdir())


def pick_points(calls, total, num_kills):
    """Return operations spread over a save: as many changes of names as writes."""
    choose = random.Random(0)
    named = choose.sample(calls, min(len(calls), num_kills // 2))
    writes = sorted({*range(1, total + 1)} - {*calls})
    return sorted([*named, *choose.sample(writes, num_kills - len(named))])


def share(points, source):
    import torch.distributed as dist

    shared = [points]
    dist.broadcast_object_list(shared, src=source)
    return shared[0]


@pytest.mark.parametrize(("num_ranks", "victim", "num_kills"), [(1, 0, 30), (2, 0, 15), (2, 1, 15)])
def test_a_writer_killed_anywhere_costs_one_checkpoint_at_most(
    num_ranks, victim, num_kills, hf_folder, tmp_path
):
    job = Job(hf_folder=hf_folder, parallel=ParallelConfig(pp_size=num_ranks))
    per_rank = run_ranks(
        killed_writers, num_ranks, tmp_path, job, tmp_path, victim, num_kills, timeout_s=200
    )
    assert len(per_rank[0][0]) == num_kills
    for survivals in zip(*(survivals for survivals, _ in per_rank), strict=True):
        assert survivals[victim].was_struck, survivals
        assert {survival.found for survival in survivals} <= {2, 3}, survivals
        assert all(survival.is_as_unbroken for survival in survivals), survivals
    if victim == 0:  # the last operations come behind the new checkpoint
        assert {survival.found for survival in per_rank[0][0]} == {2, 3}
    assert len(per_rank[0][1]) == 3, "nothing of the killed saves is left"


def cut_off(rank, world_size, init_method, job, folder, at):
    """Save step 2, then die with the whole job at operation ``at`` of the save of step 3; return
    the operations of this rank and what step 3 and step 4 are, if it lives."""
    if rank == 0:
        os.setpgid(0, 0)
        (folder / "group").write_text(str(os.getpid()))
    trainer = open_rank(rank, world_size, init_method, job)
    if rank:
        os.setpgid(0, int((folder / "group").read_text()))
    for batch in BATCHES[:2]:
        trainer.train_step(batch)
    trainer.save(folder / "saved", {"trained": 2})
    third = trainer.train_step(BATCHES[2]), as_numpy(held(trainer))
    trainer._checkpoints.finish()
    strikes = Strikes(own=True)
    strikes.arm(at, kill_group)
    trainer.save(folder / "saved", {"trained": 3})
    trainer._checkpoints.finish()
    count = strikes.count
    fourth = trainer.train_step(BATCHES[3]), as_numpy(held(trainer))
    trainer.close()
    return count, {3: third, 4: fourth}


def as_numpy(weights):
    return {name: tensor.numpy() for name, tensor in weights.items()}


def resumed(rank, world_size, init_method, job, folder):
    trainer = open_rank(rank, world_size, init_method, job)
    found, (result, weights) = go_on(trainer, folder)
    trainer.close()
    return found, (result, as_numpy(weights))


def power_cut(num_ranks, job, folder, at):
    """Run :func:`cut_off` on processes of their own until all of them are dead."""
    folder.mkdir()
    context = forks()
    ranks = [
        context.Process(
            target=cut_off,
            args=(rank, num_ranks, f"file://{folder}/rendezvous", job, folder, at),
        )
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    return [process.exitcode for process in ranks]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_job_that_loses_power_while_it_saves_goes_on_bit_by_bit(num_ranks, hf_folder, tmp_path):
    job = Job(hf_folder=hf_folder, parallel=ParallelConfig(dp_size=num_ranks))
    counted = tmp_path / "counted"
    counted.mkdir()
    unbroken = run_ranks(cut_off, num_ranks, counted, job, counted, None)
    total = sum(count for count, _ in unbroken) // num_ranks
    choose = random.Random(num_ranks)
    for number in range(NUM_POWER_CUTS):
        first, last = (turn * total // NUM_POWER_CUTS for turn in (number, number + 1))
        at = choose.randint(first + 1, last)
        folder = tmp_path / f"at-{at}"
        assert power_cut(num_ranks, job, folder, at) == [-signal.SIGKILL] * num_ranks, at
        stored = find_checkpoint(folder / "saved")
        assert stored is not None
        found = run_ranks(resumed, num_ranks, folder, job, folder / "saved")
        for (step, now), (_, then) in zip(found, unbroken, strict=True):
            assert step == stored.manifest.step
            expected = then[step + 1]
            assert now[0] == expected[0]
            for name, tensor in expected[1].items():
                np.testing.assert_array_equal(now[1][name], tensor, err_msg=name)
