"""What the engine recorded while it sampled branches, the trainer computes again from packed rows.

Together with the parity of both with transformers this closes the triangle. The policy has learnt
the tag language (``tests.policy``), so everything is sampled: tags, forks, words, broken endings.
The trainer is real Megatron in every layout (sequence parallel wherever it is tensor parallel), its
ranks joined by gloo, and its own gate stands at the tolerance of these tests.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.training import LossConfig, ParallelConfig, TrainerConfig
from npr_megatron.data.packing import pack
from npr_megatron.data.samples import rl_sample
from npr_megatron.pipeline.local_engine import open_engine
from npr_megatron.pipeline.rl import step_metrics
from npr_megatron.records.trajectory import FinishReason, FloatArray, Trajectory
from npr_megatron.train.step import StepBatch
from npr_megatron.weights.checkpoints.hf import write_hf
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL, Job, Measured, score_then_step
from tests.engines import request_for
from tests.parity.test_trainer_hf import unpacked
from tests.policy import learnt_tensors, prompt_of
from tests.structures import SMALL

TOLERANCE = 1e-5
FAR = 100 * TOLERANCE
LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tp_size=2),
    "pp2": ParallelConfig(pp_size=2),
    "tp2_pp2": ParallelConfig(tp_size=2, pp_size=2),
}
SPOILT: dict[str, Callable[[Trajectory], Trajectory]] = {
    "siblings visible": lambda t: dataclasses.replace(t, branch=np.minimum(t.branch, 1)),
    "positions flattened": lambda t: dataclasses.replace(
        t, position_ids=np.arange(len(t.token_ids))
    ),
    "branches shifted by one": lambda t: dataclasses.replace(
        t, position_ids=t.position_ids + (t.branch > 0)
    ),
}


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory) -> Path:
    """An HF folder that trainer and engine read alike."""
    folder = tmp_path_factory.mktemp("policy") / "hf"
    write_hf(folder, MODEL, learnt_tensors(MODEL))
    return folder


@pytest.fixture(scope="module")
def trajectories(policy_folder: Path) -> list[Trajectory]:
    """Groups of rollouts sampled together at temperature 1, on a pool too small for all at once."""
    config = EngineConfig(num_kv_slots=1024, max_running=24, debug_checks=True)
    engine = open_engine(policy_folder, config, SMALL)
    rng = random.Random(5)
    prompts = [prompt_of(rng) for _ in range(6)]
    sampled = engine.generate(
        [
            request_for(
                prompts[number % 6],
                prompt_id=f"p{number % 6}",
                rollout=number,
                seed=rng.getrandbits(64),
                max_new_tokens=160,
                max_critical_path=rng.choice([45, 100]),
            )
            for number in range(48)
        ]
    )
    assert sum(t.branch.max() > 1 for t in sampled) >= 16
    assert sum(t.num_blocks > 1 for t in sampled) >= 3
    assert {t.finish for t in sampled} > {FinishReason.STOP}
    return sampled


def batch_of(trajectories: Sequence[Trajectory], *, forced_tokens_in_loss: bool) -> StepBatch:
    """A PAPO batch that likes every other trajectory."""
    samples = [
        rl_sample(t, 1.0 - 2.0 * (i % 2), forced_tokens_in_loss=forced_tokens_in_loss)
        for i, t in enumerate(trajectories)
    ]
    return StepBatch(microbatches=pack(samples, 512, 1, 1), loss=LossConfig(kind="papo"))


def measure(
    trajectories: Sequence[Trajectory], parallel: ParallelConfig, folder: Path, tmp_path: Path
) -> tuple[list[FloatArray], Measured]:
    """Return |trainer - engine| of every generated token something predicts, and what a step under
    the gate said of the sampled ones.
    """
    to_score = batch_of(trajectories, forced_tokens_in_loss=True)
    job = Job(
        hf_folder=folder,
        parallel=parallel,
        trainer=TrainerConfig(max_logprob_gap=TOLERANCE),
        score=(to_score,),
        batches=(batch_of(trajectories, forced_tokens_in_loss=False),),
    )
    measured = run_ranks(score_then_step, parallel.world_size, tmp_path, job)
    assert len({(m.result, m.refusal) for m in measured}) == 1, "ranks disagree"
    gaps = []
    for trajectory in trajectories:
        sample = rl_sample(trajectory, 1.0, forced_tokens_in_loss=True)
        scored = unpacked(to_score.microbatches, measured[0].logprobs, sample)
        gaps.append(np.abs(scored - trajectory.logprobs)[sample.loss_mask])
    return gaps, measured[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trainer_and_engine_agree_on_every_token_and_the_step_says_so(
    layout, trajectories, policy_folder, tmp_path
):
    gaps, measured = measure(trajectories, LAYOUTS[layout], policy_folder, tmp_path)
    assert sum(map(len, gaps)) > 1000
    assert max(gap.max() for gap in gaps) <= TOLERANCE
    assert measured.result is not None, measured.refusal
    metrics = step_metrics(measured.result)
    assert 0.0 < metrics["train/logprob_gap_mean"] < metrics["train/logprob_gap_max"] <= TOLERANCE


@pytest.mark.parametrize("spoil", SPOILT)
def test_parity_breaks_and_the_gate_shuts_when_branches_are_not_isolated(
    spoil, trajectories, policy_folder, tmp_path
):
    forked = [t for t in trajectories if t.branch.max() > 1]
    spoilt = [SPOILT[spoil](t) for t in forked]
    gaps, measured = measure(spoilt, LAYOUTS["tp1"], policy_folder, tmp_path)
    assert min(gap.max() for gap in gaps) > FAR
    assert measured.result is None
    assert f"agree on log-probs within {TOLERANCE}" in measured.refusal
