"""A run that loses a replica, and one that loses its driver, end where an undisturbed run ends."""

import shutil

import pytest

from tests.end_to_end.runs import SMALL, Run, descendants, kill, start, survivors

pytestmark = pytest.mark.slow
LEARNT = ("train/loss", "rollout/reward", "rollout/tokens")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Run:
    """A small run that nothing happened to; the seed model it trains is cached for the others."""
    run = start(tmp_path_factory.mktemp("runs"), *SMALL)
    run.wait_for_step("zero", 1)
    started = descendants(run.process)
    assert run.wait() == 0, run.output()
    assert survivors(started) == []
    return run


def assert_learnt_the_same(run: Run, reference: Run) -> None:
    for stage in ("zero", "beta", "npr"):
        steps, expected = run.steps(stage), reference.steps(stage)
        assert sorted(steps) == sorted(expected)
        for step, values in expected.items():
            for name in LEARNT:
                if name in values:
                    assert steps[step][name] == pytest.approx(values[name], abs=1e-6), (
                        stage,
                        step,
                        name,
                    )


def test_a_run_prints_its_table_and_leaves_a_page_and_a_model(undisturbed):
    output = undisturbed.output()
    for word in ("zero", "beta", "npr", "report:", "npr generate"):
        assert word in output
    assert (undisturbed.folder / "report.html").stat().st_size > 10_000
    assert (undisturbed.folder / "stages/npr/hf/model.safetensors").exists()
    assert max(m["train/logprob_gap_max"] for m in undisturbed.steps("npr").values()) < 1e-4


def test_a_replica_killed_during_zero_changes_nothing(undisturbed, tmp_path):
    shutil.copytree(undisturbed.folder.parent / "seed-models", tmp_path / "seed-models")
    run = start(tmp_path, *SMALL, name="replica")
    run.wait_for_step("zero", 1)
    kill(run.replica_pids()[0])
    assert run.wait() == 0, run.output()
    assert_learnt_the_same(run, undisturbed)


def test_a_killed_driver_leaves_nothing_running_and_resumes_at_the_next_step(undisturbed, tmp_path):
    shutil.copytree(undisturbed.folder.parent / "seed-models", tmp_path / "seed-models")
    first = start(tmp_path, *SMALL, name="driver")
    first.wait_for_step("zero", 2)
    started = descendants(first.process)
    kill(first.process.pid)
    first.wait()
    assert survivors(started) == []
    done = max(first.steps("zero"))

    second = start(tmp_path, *SMALL, name="driver")
    assert second.wait() == 0, second.output()
    assert f"zero: resumed after {done} step" in second.output()
    assert_learnt_the_same(second, undisturbed)

    third = start(tmp_path, *SMALL, name="driver")  # everything is finished: only the report
    assert third.wait() == 0, third.output()
