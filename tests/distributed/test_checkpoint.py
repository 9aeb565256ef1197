"""A checkpoint continues the run: bit by bit under its own layout, and under any other."""

from __future__ import annotations

import numpy as np
import pytest

from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import InputError
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL, Job, check_weights, open_rank, train, whole_model
from tests.distributed.samples import step_batches

BATCHES = step_batches("sft", 4)


def run(tmp_path, parallel, **job):
    outcomes = run_ranks(train, parallel.world_size, tmp_path, Job(parallel=parallel, **job))
    weights = whole_model([outcome.storages for outcome in outcomes], MODEL, parallel)
    return outcomes[0], weights


LAYOUTS = {
    "tp2": ParallelConfig(tp_size=2),
    "pp2 vpp2": ParallelConfig(pp_size=2, vpp_size=2),
    "pp3 uneven": ParallelConfig(
        pp_size=3, num_layers_in_first_stage=1, num_layers_in_last_stage=1
    ),
    "dp2 overlapped": ParallelConfig(dp_size=2, overlap_data_parallel=True),
    "pp2 vpp2 by string": ParallelConfig(pp_size=2, vpp_size=2, pipeline_layout="E|ttt|t|L"),
    "tp2 dp2": ParallelConfig(tp_size=2, dp_size=2),
    "cp2": ParallelConfig(cp_size=2),
    "one rank": ParallelConfig(),
}
NAMES = [*LAYOUTS]
PAIRS = [(a, NAMES[(i + step) % len(NAMES)]) for i, a in enumerate(NAMES) for step in (1, 3)]


@pytest.mark.parametrize("name", ["tp2", "dp2 overlapped", "pp2 vpp2"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(name, hf_folder, tmp_path):
    parallel = LAYOUTS[name]
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


@pytest.fixture(scope="module")
def saved(hf_folder, tmp_path_factory):
    """A checkpoint after two steps under each layout, and four steps of one rank."""
    folder = tmp_path_factory.mktemp("saved")
    for name, parallel in LAYOUTS.items():
        run(folder, parallel, hf_folder=hf_folder, batches=BATCHES[:2], save_to=folder / name)
    return folder, run(folder, ParallelConfig(), hf_folder=hf_folder, batches=BATCHES)


@pytest.mark.parametrize(("written", "read"), PAIRS, ids=lambda name: name)
def test_a_checkpoint_continues_under_any_layout(written, read, saved, hf_folder, tmp_path):
    folder, (uninterrupted, expected) = saved
    resumed, weights = run(
        tmp_path,
        LAYOUTS[read],
        hf_folder=hf_folder,
        load_from=folder / written,
        batches=BATCHES[2:],
    )
    for got, want in zip(resumed.results, uninterrupted.results[2:], strict=True):
        assert got.loss == pytest.approx(want.loss, rel=1e-5)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-5)
        assert got.learning_rate == want.learning_rate
    check_weights(weights, expected)


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


def test_the_newest_complete_checkpoint_is_loaded_and_the_one_before_kept(hf_folder, tmp_path):
    folder = tmp_path / "checkpoints"
    ((complaint, progress, left),) = run_ranks(
        save_twice_then_look, 1, tmp_path, Job(hf_folder=hf_folder), folder
    )
    assert "name a folder that a trainer has saved to" in complaint
    assert progress == {"saves": 2}
    assert left == ["step-00000001", "step-00000002"]
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
