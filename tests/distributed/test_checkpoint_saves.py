"""What a save does to the training beside it, and what it does when the disk or a file fails."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time

import numpy as np
import pytest

from npr_megatron.config.checkpoint import CheckpointKeeping
from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import InputError
from npr_megatron.train.checkpoint_folder import find_checkpoint
from tests.distributed.harness import forks, run_ranks
from tests.distributed.jobs import Job, open_rank
from tests.distributed.samples import step_batches
from tests.distributed.strikes import Gate, Strikes, disk_full

BATCHES = step_batches("sft", 5)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def held(trainer):
    return {name: tensor.clone().numpy() for name, tensor in trainer.storages.items()}


class Warnings(logging.Handler):
    """What the package warns of in this process."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []
        logging.getLogger("npr_megatron").addHandler(self)

    def emit(self, record):
        self.lines.append(record.getMessage())


def train_beside_a_save(rank, world_size, init_method, job, folder):
    """Hold the writer up, train two steps, let it go; return what was saved and what was loaded."""
    trainer = open_rank(rank, world_size, init_method, job)
    trainer.train_step(BATCHES[0])
    gate, strikes = Gate(), Strikes()
    strikes.arm(3, gate, torn=False)
    trainer.save(folder, {"trained": 1})
    saved = held(trainer)
    gate.wait_until_reached()
    beside = [trainer.train_step(batch) for batch in BATCHES[1:3]]
    found_beside = find_checkpoint(folder)
    gate.open()
    progress = trainer.load(folder)
    loaded = held(trainer)
    again = [trainer.train_step(batch) for batch in BATCHES[1:3]]
    trainer.close()
    return saved, loaded, beside == again, found_beside, progress


def test_training_goes_on_while_a_checkpoint_is_written_and_what_is_written_is_as_it_was(
    hf_folder, tmp_path
):
    job = Job(hf_folder=hf_folder, parallel=ParallelConfig(tp_size=2))
    for outcome in run_ranks(train_beside_a_save, 2, tmp_path, job, tmp_path / "saved"):
        saved, loaded, same_steps, found_beside, progress = outcome
        assert found_beside is None
        assert progress == {"trained": 1}
        assert same_steps
        for name, tensor in saved.items():
            np.testing.assert_array_equal(loaded[name], tensor, err_msg=name)
    assert names(tmp_path / "saved") == ["latest", "step-00000001"]


def save_on_a_full_disk(rank, world_size, init_method, job, folder):
    """Fill the disk under the second save, then train and save on."""
    trainer, warnings = open_rank(rank, world_size, init_method, job), Warnings()
    trainer.train_step(BATCHES[0])
    trainer.save(folder, {"trained": 1})
    trainer._checkpoints.finish()
    strikes = Strikes()
    if rank == world_size - 1:
        strikes.arm(40, disk_full)
    trainer.train_step(BATCHES[1])
    trainer.save(folder, {"trained": 2})
    trainer._checkpoints.finish()
    left = names(folder)
    strikes.arm(None)
    result = trainer.train_step(BATCHES[2])
    trainer.save(folder, {"trained": 3})
    trainer.close()
    return warnings.lines, left, result.skipped, names(folder)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_full_disk_costs_the_save_and_nothing_else(num_ranks, hf_folder, tmp_path):
    job = Job(hf_folder=hf_folder, parallel=ParallelConfig(pp_size=num_ranks))
    outcomes = run_ranks(save_on_a_full_disk, num_ranks, tmp_path, job, tmp_path / "saved")
    (told,), left, skipped, afterwards = outcomes[0]
    assert f"the checkpoint of step 2 was not written to {tmp_path / 'saved'}" in told
    assert "No space left on device" in told
    assert ("rank 1: " in told) == (num_ranks == 2)
    assert "the last one there is step-00000001, training goes on" in told
    assert left == ["latest", "step-00000001"]
    assert not skipped
    assert afterwards == ["latest", "step-00000001", "step-00000003"]
    assert [lines for lines, *_ in outcomes[1:]] == [[]] * (num_ranks - 1)


def die_while_writing(rank, world_size, init_method, job, folder):
    """Hold the writer up and die beside it."""
    trainer = open_rank(rank, world_size, init_method, job)
    gate, strikes = Gate(), Strikes()
    strikes.arm(10, gate, torn=False)
    trainer.save(folder, {"trained": 0})
    gate.wait_until_reached()
    (folder / "writer").write_text(str(trainer._checkpoints._in_flight.process.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_writer_ends_with_its_rank(hf_folder, tmp_path):
    folder = tmp_path / "saved"
    rank = forks().Process(
        target=die_while_writing,
        args=(0, 1, f"file://{tmp_path}/rendezvous", Job(hf_folder=hf_folder), folder),
    )
    rank.start()
    rank.join(60)
    assert rank.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while is_alive(int((folder / "writer").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert find_checkpoint(folder) is None


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def spoil(path):
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def load_what_was_spoilt(rank, world_size, init_method, job, folder):
    """Spoil files of the newest of two checkpoints one after the other, then of both."""
    trainer, warnings = open_rank(rank, world_size, init_method, job), Warnings()
    whole = folder / "whole"
    for number, batch in enumerate(BATCHES[:2]):
        trainer.train_step(batch)
        trainer.save(whole, {"trained": number + 1})
    trainer._checkpoints.finish()
    told = {}
    for name in names(whole / "step-00000002"):
        spoilt = shutil.copytree(whole, folder / f"spoilt-{name}")
        spoil(spoilt / "step-00000002" / name)
        told[name] = trainer.load(spoilt), warnings.lines[:]
        warnings.lines.clear()
    for name in ("step-00000001", "step-00000002"):
        (whole / name / "common.pt").unlink()
        spoil(whole / name / ".metadata")
    complaint = complaint_of(trainer, whole)
    trainer.close()
    return told, complaint


def complaint_of(trainer, folder):
    try:
        trainer.load(folder)
    except InputError as error:
        return str(error)
    return "loaded"


def test_a_damaged_file_is_named_and_the_checkpoint_before_taken(hf_folder, tmp_path):
    ((told, complaint),) = run_ranks(
        load_what_was_spoilt, 1, tmp_path, Job(hf_folder=hf_folder), tmp_path
    )
    assert sorted(told) == [
        ".metadata",
        "__0_0.distcp",
        "common.pt",
        "manifest.json",
        "metadata.json",
    ]
    for name, (progress, lines) in told.items():
        assert progress == {"trained": 1}, name
        assert any(f"step-00000002/{name}" in line for line in lines), name
    assert "none there is whole" in complaint
    assert complaint.count("common.pt cannot be read") == 2
    assert "remove the folder to begin again" in complaint


def load_as_another(rank, world_size, init_method, job, folder):
    trainer = open_rank(rank, world_size, init_method, job)
    spoil(folder / "step-00000000" / "__0_0.distcp")  # tensors are not even looked at
    complaint = complaint_of(trainer, folder)
    trainer.close()
    return complaint


def save_at_once(rank, world_size, init_method, job, folder):
    trainer = open_rank(rank, world_size, init_method, job)
    trainer.save(folder, {})
    trainer.close()


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(
    hf_folder, untied_hf_folder, tmp_path
):
    job, folder = Job(hf_folder=hf_folder), tmp_path / "saved"
    run_ranks(save_at_once, 1, tmp_path, job, folder)
    manifest = json.loads((folder / "step-00000000" / "manifest.json").read_text())
    assert manifest["versions"]["megatron_core"]
    other = Job(
        hf_folder=untied_hf_folder,
        model=job.model.model_copy(update={"tie_word_embeddings": False}),
    )
    (complaint,) = run_ranks(load_as_another, 1, tmp_path, other, folder)
    assert "is of another trainer: tie_word_embeddings is True there, False here;" in complaint


def test_replicas_share_the_writing(hf_folder, tmp_path):
    job, folder = Job(hf_folder=hf_folder, parallel=ParallelConfig(dp_size=2)), tmp_path / "saved"
    run_ranks(save_at_once, 2, tmp_path, job, folder)
    first, second = (
        (folder / "step-00000000" / f"__{rank}_0.distcp").stat().st_size for rank in range(2)
    )
    assert 0.8 < first / second < 1.25


def draw_around_a_save(rank, world_size, init_method, job, folder):
    """Return what random numbers come behind a save, and behind the load of it."""
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    def draw():
        with get_cuda_rng_tracker().fork():
            sharded = torch.rand(3)
        return [*torch.rand(3).tolist(), *sharded.tolist()]

    trainer = open_rank(rank, world_size, init_method, job)
    before = draw()
    trainer.save(folder, {})
    behind = draw()
    trainer.load(folder)
    again = draw()
    trainer.close()
    return before, behind, again


def test_random_states_of_every_rank_come_back(hf_folder, tmp_path):
    job = Job(hf_folder=hf_folder, parallel=ParallelConfig(tp_size=2))
    first, second = run_ranks(draw_around_a_save, 2, tmp_path, job, tmp_path / "saved")
    for before, behind, again in (first, second):
        assert behind == again != before
    assert first[1] != second[1]


def save_five(rank, world_size, init_method, job, folder, keep_last):
    from npr_megatron.train.checkpoint import Checkpoints

    trainer = open_rank(rank, world_size, init_method, job)
    keeping = CheckpointKeeping(keep_last=keep_last, in_background=False)
    trainer._checkpoints = Checkpoints(keeping, job.parallel)
    for batch in BATCHES:
        trainer.train_step(batch)
        trainer.save(folder, {})
    trainer.save(folder, {})  # the same step again
    trainer.close()


def test_the_last_few_are_kept_and_a_step_saved_twice_counts_once(hf_folder, tmp_path):
    run_ranks(save_five, 1, tmp_path, Job(hf_folder=hf_folder), tmp_path / "saved", 3)
    assert names(tmp_path / "saved") == [
        "latest",
        "step-00000003",
        "step-00000004",
        "step-00000005-2",
    ]
    assert (tmp_path / "saved" / "latest").read_text() == "step-00000005-2"
