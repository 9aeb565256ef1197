"""A run that loses a replica, and one that loses its driver, end where an undisturbed run ends."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from npr_megatron.train.checkpoint_folder import find_checkpoint
from tests.end_to_end.runs import (
    GPU_EXAMPLE,
    NPR,
    ON_A_LAPTOP,
    SMALL,
    Run,
    descendants,
    kill,
    start,
    survivors,
)

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


def test_the_trained_model_answers_from_its_folder(undisturbed):
    model = undisturbed.folder / "stages/npr/hf"
    command = [NPR, "generate", str(model), "a:1+2;b:3+4?", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (line,) = answer.stdout.splitlines()
    assert json.loads(line)


def test_the_trained_model_converts_and_compares(undisturbed, tmp_path):
    model, megatron = undisturbed.folder / "stages/npr/hf", tmp_path / "megatron-npr"

    def weights(*arguments: str | Path) -> str:
        command = [NPR, "weights", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True
        ).stdout

    weights("convert", model, megatron, "--tp", "2", "--pp", "2")
    assert "digest" in weights("verify", megatron)
    weights("diff", megatron, model)  # exits with 1 where a bit differs


@pytest.mark.thorough
def test_a_given_model_starts_at_zero_with_problems_from_files(undisturbed, tmp_path):
    for name in ("train", "test"):
        numbers = range(1, 5) if name == "train" else range(5, 9)
        problems = [
            {"id": f"{name}{i}", "question": f"a:{i}+1;b:{i}+2?", "answer": f"{i + 1},{i + 2}"}
            for i in numbers
        ]
        text = "".join(json.dumps(problem) + "\n" for problem in problems)
        (tmp_path / f"{name}.jsonl").write_text(text)
    run = start(
        tmp_path,
        f"model.path={undisturbed.folder / 'stages/seed/hf'}",
        f"task.train_path={tmp_path / 'train.jsonl'}",
        f"task.test_path={tmp_path / 'test.jsonl'}",
        *ON_A_LAPTOP,
        "zero.num_steps=2",
        "zero.optimizer.warmup_steps=1",
        "zero.prompts_per_step=4",
        "zero.rollouts_per_prompt=4",
        "evaluation.num_problems=4",
        "evaluation.rollouts_per_problem=2",
        run_file=GPU_EXAMPLE,
        until="zero",
    )
    assert run.wait() == 0, run.output()
    assert sorted(run.steps("zero")) == [1, 2]
    assert (run.folder / "stages/zero/hf/model.safetensors").exists()


def test_a_killed_replica_changes_nothing_and_a_killed_driver_resumes_behind_its_checkpoint(
    undisturbed, tmp_path
):
    shutil.copytree(undisturbed.folder.parent / "seed-models", tmp_path / "seed-models")
    first = start(tmp_path, *SMALL, name="driver")
    first.wait_for_step("zero", 1)
    kill(first.replica_pids()[0])
    first.wait_for_step("zero", 3)
    started = descendants(first.process)
    kill(first.process.pid)
    first.wait()
    assert survivors(started) == []
    stored = find_checkpoint(first.folder / "stages/zero/checkpoints")
    assert stored is not None
    done = stored.manifest.progress["step"]
    assert max(first.steps("zero")) - done in (0, 1)  # the last one may have been under way

    second = start(tmp_path, *SMALL, name="driver")
    assert second.wait() == 0, second.output()
    assert f"zero: resumed after {done} step" in second.output()
    assert_learnt_the_same(second, undisturbed)

    third = start(tmp_path, *SMALL, name="driver")  # everything is finished: only the report
    assert third.wait() == 0, third.output()
