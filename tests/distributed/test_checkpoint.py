"""A checkpoint continues the run: bit by bit under its own layout, and under any other."""

from __future__ import annotations

import numpy as np
import pytest

from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import InputError
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL, Job, open_rank, train, whole_model
from tests.distributed.samples import step_batches

BATCHES = step_batches("sft", 4)


def run(tmp_path, parallel, **job):
    outcomes = run_ranks(train, parallel.world_size, tmp_path, Job(parallel=parallel, **job))
    weights = whole_model([outcome.storages for outcome in outcomes], MODEL, parallel)
    return outcomes[0], weights


@pytest.mark.parametrize("size", ["tp_size", "dp_size"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(size, hf_folder, tmp_path):
    parallel = ParallelConfig(**{size: 2})
    saved = tmp_path / "checkpoints"
    whole, expected = run(tmp_path, parallel, hf_folder=hf_folder, batches=BATCHES)
    run(tmp_path, parallel, hf_folder=hf_folder, batches=BATCHES[:2], save_to=saved)
    resumed, weights = run(
        tmp_path, parallel, hf_folder=hf_folder, load_from=saved, batches=BATCHES[2:]
    )

    assert resumed.progress == {"trained": 2}
    assert resumed.results == whole.results[2:]
    for name, tensor in expected.items():
        np.testing.assert_array_equal(weights[name], tensor, err_msg=name)


def test_checkpoint_of_pp2_continues_under_tp2_and_on_one_rank(hf_folder, tmp_path):
    saved = tmp_path / "checkpoints"
    pp2 = ParallelConfig(pp_size=2)
    _, expected = run(tmp_path, pp2, hf_folder=hf_folder, batches=BATCHES)
    run(tmp_path, pp2, hf_folder=hf_folder, batches=BATCHES[:2], save_to=saved)
    for parallel in (ParallelConfig(tp_size=2), ParallelConfig()):
        _, weights = run(
            tmp_path, parallel, hf_folder=hf_folder, load_from=saved, batches=BATCHES[2:]
        )
        for name, tensor in expected.items():
            np.testing.assert_allclose(weights[name], tensor, atol=1e-4, err_msg=name)


def save_twice_then_look(rank, world_size, init_method, job, folder):
    """Return what a load from nothing said, and what two saves and a crashed third leave."""
    trainer = open_rank(rank, world_size, init_method, job)
    complaint = ""
    try:
        trainer.load(folder)
    except InputError as error:
        complaint = str(error)
    for number, batch in enumerate(BATCHES[:2]):
        trainer.train_step(batch)
        trainer.save(folder, {"saves": number + 1})
    (folder / ".partial-step-00000003").mkdir()
    progress = trainer.load(folder)
    trainer.close()
    return complaint, progress, sorted(path.name for path in folder.glob("step-*"))


def test_only_the_newest_complete_checkpoint_is_kept_and_loaded(hf_folder, tmp_path):
    folder = tmp_path / "checkpoints"
    ((complaint, progress, left),) = run_ranks(
        save_twice_then_look, 1, tmp_path, Job(hf_folder=hf_folder), folder
    )
    assert "name a folder that a trainer has saved to" in complaint
    assert progress == {"saves": 2}
    assert left == ["step-00000002"]
    assert (folder / "latest").read_text() == "step-00000002"


def save_before_the_first_update(rank, world_size, init_method, job, folder):
    """Return the steps of a stage that was saved as it began, loaded and then trained."""
    trainer = open_rank(rank, world_size, init_method, job)
    trainer.save(folder, {"saves": 1})
    trainer.load(folder)
    results = [trainer.train_step(batch) for batch in BATCHES[:2]]
    trainer.close()
    return results


def test_a_stage_can_be_saved_before_its_first_update(hf_folder, tmp_path):
    job = Job(hf_folder=hf_folder)
    (resumed,) = run_ranks(save_before_the_first_update, 1, tmp_path, job, tmp_path / "saved")
    untouched, _ = run(tmp_path, ParallelConfig(), hf_folder=hf_folder, batches=BATCHES[:2])
    assert resumed == untouched.results
