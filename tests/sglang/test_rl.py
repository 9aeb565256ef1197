"""The quickstart's stages with SGLang workers: rollouts there, training here, a push after each
update.
"""

from __future__ import annotations

import pytest

from tests.end_to_end.runs import SMALL, Run, descendants, start, survivors

pytestmark = pytest.mark.slow
DEADLINE_S = 900.0
"""Two engines start side by side: a minute alone, many on a machine that others use."""
ON_SGLANG = (
    *SMALL,
    "engine.backend=sglang",
    "engine.num_kv_slots=8192",
    "engine.max_streams=64",
    "zero.num_steps=3",
    "zero.optimizer.warmup_steps=1",
    "beta.num_steps=6",
    "beta.optimizer.warmup_steps=1",
    "npr.num_steps=4",
    "npr.optimizer.warmup_steps=1",
    "evaluation.num_problems=4",
    "evaluation.speed_problems=0",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = start(tmp_path_factory.mktemp("runs"), *ON_SGLANG)
    run.wait_for_step("zero", 1, DEADLINE_S)
    started = descendants(run.process)
    names = [process.name() for process in started if process.is_running()]
    assert sum("sglang" in name for name in names) >= 2, names
    assert run.wait(DEADLINE_S) == 0, run.output()
    assert survivors(started) == []
    return run


@pytest.mark.parametrize("stage", ["zero", "npr"])
def test_rollouts_and_training_agree_on_every_token(run, stage):
    steps = run.steps(stage)
    gaps = [values["train/logprob_gap_max"] for values in steps.values() if "train/loss" in values]
    assert gaps, f"no step of {stage} learnt anything: {steps}"
    assert max(gaps) < 1e-4


def test_every_update_is_pushed_before_the_next_rollouts(run):
    pushed = [
        values["push/s"] > 0
        for stage in ("zero", "npr")
        for values in run.steps(stage).values()
        if values["train/updated"]
    ]
    assert len(pushed) >= 2
    assert all(pushed)


def test_branches_are_decoded_at_once(run):
    values = run.steps("npr")
    assert any(
        step["rollout/critical_path_tokens"] < step["rollout/tokens"] for step in values.values()
    )
