"""What the engine recorded while decoding branches, the trainer computes again from packed rows.

Together with the parity of both with transformers this closes the triangle: trajectories with three
and more blocks and branches of unequal lengths, each token dictated and priced by the engine.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.training import LossConfig, ParallelConfig
from npr_megatron.data.packing import pack
from npr_megatron.data.samples import rl_sample
from npr_megatron.pipeline.local_engine import open_engine
from npr_megatron.records.trajectory import Trajectory
from npr_megatron.train.step import StepBatch
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL, Job, train
from tests.distributed.samples import branched_sample
from tests.engines import drain, request_for, teacher_of
from tests.parity.test_trainer_hf import unpacked
from tests.structures import SMALL

LAYOUTS = [ParallelConfig(), ParallelConfig(tp_size=2, pp_size=2)]


@pytest.fixture(scope="module")
def trajectories(hf_folder) -> list[Trajectory]:
    """Rollouts of dictated responses, decoded together by fork and join."""
    engine = open_engine(hf_folder, EngineConfig(num_kv_slots=8192, debug_checks=True), SMALL)
    rng = np.random.default_rng(5)
    for number in range(4):
        sample = branched_sample(rng, num_blocks=3 + number % 2)
        prompt_length = int(np.argmax(sample.loss_mask))
        teacher = teacher_of(sample.token_ids, prompt_length, SMALL)
        prompt_ids = sample.token_ids[:prompt_length].tolist()
        engine.add(request_for(prompt_ids, prompt_id=f"p{number}", seed=number), teacher)
    finished = drain(engine)
    assert all(trajectory.num_blocks >= 3 for trajectory in finished)
    return finished


def gaps(trajectories, parallel, hf_folder, tmp_path) -> list[np.ndarray]:
    """Return |trainer - engine| log-probs of every generated token something predicts."""
    samples = [rl_sample(t, 1.0, forced_tokens_in_loss=True) for t in trajectories]
    batches = pack(samples, 640, 1, parallel.dp_size)
    to_score = StepBatch(microbatches=batches, loss=LossConfig(kind="papo"))
    job = Job(hf_folder=hf_folder, model=MODEL, parallel=parallel, score=(to_score,))
    scored = run_ranks(train, parallel.world_size, tmp_path, job)[0].logprobs[0]
    return [
        np.abs(unpacked(batches, scored, sample) - trajectory.logprobs)[sample.loss_mask]
        for sample, trajectory in zip(samples, trajectories, strict=True)
    ]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=["one", "tp2_pp2"])
def test_trainer_and_engine_agree_on_every_token(parallel, trajectories, hf_folder, tmp_path):
    found = gaps(trajectories, parallel, hf_folder, tmp_path)
    assert sum(len(gap) for gap in found) > 200
    assert max(gap.max() for gap in found) <= 1e-5


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: dataclasses.replace(t, branch=np.minimum(t.branch, 1)),
        lambda t: dataclasses.replace(t, position_ids=np.arange(len(t.token_ids))),
    ],
    ids=["siblings visible", "flattened positions"],
)
def test_parity_breaks_when_branches_are_not_isolated(spoil, trajectories, hf_folder, tmp_path):
    found = gaps([spoil(t) for t in trajectories], LAYOUTS[0], hf_folder, tmp_path)
    assert min(gap.max() for gap in found) > 1e-3
