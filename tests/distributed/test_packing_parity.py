"""Company in a row changes no token's log-prob, and a leak between those that share one shows.

Each sample is scored by the trainer alone, and packed with many others. Attention on a CPU has two
forms, a mask for short rows and segments for long ones; both are held to it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from npr_megatron.config.training import LossConfig, ParallelConfig
from npr_megatron.data.packing import pack
from npr_megatron.data.samples import sft_sample
from npr_megatron.records.sample import TrainingSample
from npr_megatron.topology.layout import plain_layout
from npr_megatron.train.step import StepBatch
from tests.distributed import planted
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import Job, train
from tests.distributed.samples import branched_sample
from tests.parity.test_trainer_hf import unpacked
from tests.structures import WORDS

TOLERANCE = 1e-5
NUM_SAMPLES = 24
LAYOUTS = {"one rank": ParallelConfig(), "cp2": ParallelConfig(cp_size=2)}
FORMS = {"mask": planted.attention_is_under_a_mask, "segments": planted.attention_is_by_segments}
LEAKS = {
    planted.rows_leak: "one rank",
    planted.branches_leak: "one rank",
    planted.keys_of_other_ranks_are_taken_for_ones_own: "cp2",
}
Change = Callable[[], None]


def score(
    rank: int, world_size: int, init_method: str, job: Job, changes: tuple[Change, ...]
) -> list[list[np.ndarray]]:
    """Change this process, then return the log-probs of what the job scores."""
    for change in changes:
        change()
    return train(rank, world_size, init_method, job).logprobs


@pytest.fixture(scope="module")
def samples() -> list[TrainingSample]:
    rng = np.random.default_rng(5)
    return [
        branched_sample(rng, num_blocks=number % 4) if number % 4 else sequential_sample(rng)
        for number in range(NUM_SAMPLES)
    ]


def sequential_sample(rng: np.random.Generator) -> TrainingSample:
    token_ids = rng.choice(WORDS, rng.integers(8, 60))
    return sft_sample(token_ids, 4, plain_layout(len(token_ids), 4))


@pytest.fixture(scope="module")
def scored(hf_folder, tmp_path_factory) -> Callable[..., list[np.ndarray]]:
    """The trainer's [T] log-probs of samples that are packed in the groups given."""
    folder = tmp_path_factory.mktemp("packing")

    def run(groups: list[list[TrainingSample]], layout: str, *changes: Change) -> list[np.ndarray]:
        batches = [pack(group, 640, 2, 1) for group in groups]
        loss = LossConfig(kind="sft")
        job = Job(
            hf_folder=hf_folder,
            parallel=LAYOUTS[layout],
            score=tuple(StepBatch(microbatches=batch, loss=loss) for batch in batches),
        )
        logprobs, *_ = run_ranks(score, job.parallel.world_size, folder, job, changes)
        return [
            unpacked(packed, scores, sample)
            for group, packed, scores in zip(groups, batches, logprobs, strict=True)
            for sample in group
        ]

    return run


@pytest.fixture(scope="module")
def alone(scored, samples) -> list[np.ndarray]:
    return scored([[sample] for sample in samples], "one rank", FORMS["mask"])


def largest_difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(np.abs(f - e).max() for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_many_trajectories_changes_no_logprob(layout, form, scored, samples, alone):
    batches = pack(samples, 640, 2, 1)
    assert sum(int(batch.segment.max(axis=1).sum()) for batch in batches) >= NUM_SAMPLES // 2
    packed = scored([samples], layout, FORMS[form])
    assert largest_difference(packed, alone) <= TOLERANCE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("leak", LEAKS, ids=lambda leak: leak.__name__)
def test_a_planted_leak_shows(leak, form, scored, samples, alone):
    packed = scored([samples], LEAKS[leak], FORMS[form], leak)
    assert largest_difference(packed, alone) > 100 * TOLERANCE
