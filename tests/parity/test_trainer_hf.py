"""The trainer's log-probs are those of Hugging Face's Qwen3 under explicit mask and positions."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from npr_megatron.config.training import LossConfig, ParallelConfig
from npr_megatron.data.packing import pack
from npr_megatron.records.sample import PackedBatch, TrainingSample
from npr_megatron.train.step import StepBatch
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL, Job, train
from tests.distributed.samples import branched_sample

LAYOUTS = {
    "one": ParallelConfig(),
    "tp2_pp2": ParallelConfig(tp_size=2, pp_size=2),
    "cp2_tp2": ParallelConfig(cp_size=2, tp_size=2),
}


def may_see(sample: TrainingSample, query: int, key: int) -> bool:
    """Say it in words: the past, except other branches of the block the query is in."""
    if key > query:
        return False
    in_same_block = sample.block[query] > 0 and sample.block[query] == sample.block[key]
    return not (in_same_block and sample.branch[query] != sample.branch[key])


@torch.no_grad()
def hf_logprobs(hf: Qwen3ForCausalLM, sample: TrainingSample) -> np.ndarray:
    """Return [T] log-probs of each learnt token given its predecessor, one sample at a time."""
    length = len(sample.token_ids)
    mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min)
    for query in range(length):
        for key in range(query + 1):
            if may_see(sample, query, key):
                mask[0, 0, query, key] = 0.0
    logits = hf(
        input_ids=torch.tensor(sample.token_ids[None], dtype=torch.int64),
        position_ids=torch.tensor(sample.position_ids[None], dtype=torch.int64),
        attention_mask=mask,
        use_cache=False,
    ).logits[0]
    logprobs = logits.log_softmax(-1).numpy()
    learnt = [
        logprobs[sample.predecessor[t], sample.token_ids[t]] if sample.loss_mask[t] else 0.0
        for t in range(length)
    ]
    return np.array(learnt, dtype=np.float32)


def unpacked(
    batches: tuple[PackedBatch, ...], logprobs: list[np.ndarray], sample: TrainingSample
) -> np.ndarray:
    """Return [T] log-probs of ``sample``'s tokens out of the packed rows."""
    for batch, scored in zip(batches, logprobs, strict=True):
        for row in range(batch.shape[0]):
            for segment in range(batch.segment[row].max() + 1):
                (cells,) = np.nonzero(batch.segment[row] == segment)
                if np.array_equal(batch.token_ids[row, cells], sample.token_ids):
                    own = scored[row, cells]
                    return np.where(sample.loss_mask, own[sample.predecessor], 0.0)
    raise AssertionError("the sample is in no row")


@pytest.fixture(scope="module")
def samples() -> list[TrainingSample]:
    rng = np.random.default_rng(11)
    return [branched_sample(rng, num_blocks=num_blocks) for num_blocks in (3, 4, 3, 5)]


@pytest.fixture(scope="module")
def hf_model(hf_folder) -> Qwen3ForCausalLM:
    config = Qwen3Config(**json.loads((hf_folder / "config.json").read_text()))
    config._attn_implementation = "eager"
    hf = Qwen3ForCausalLM(config).eval()
    hf.load_state_dict(load_file(hf_folder / "model.safetensors"), strict=False)
    hf.tie_weights()
    return hf


def trainer_logprobs(samples, parallel, hf_folder, tmp_path) -> list[np.ndarray]:
    """Return the trainer's [T] log-probs of every sample, computed from packed rows."""
    batches = pack(samples, 640, 1, parallel.dp_size)
    assert max(batch.segment.max() for batch in batches) >= 1, "no row holds two samples"
    to_score = StepBatch(microbatches=batches, loss=LossConfig(kind="sft"))
    job = Job(hf_folder=hf_folder, model=MODEL, parallel=parallel, score=(to_score,))
    outcomes = run_ranks(train, parallel.world_size, tmp_path, job)
    for outcome in outcomes[1:]:
        np.testing.assert_array_equal(outcome.logprobs, outcomes[0].logprobs)
    return [unpacked(batches, outcomes[0].logprobs[0], sample) for sample in samples]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_of_branched_samples_equal_hf(layout, samples, hf_model, hf_folder, tmp_path):
    scored = trainer_logprobs(samples, LAYOUTS[layout], hf_folder, tmp_path)
    for sample, got in zip(samples, scored, strict=True):
        np.testing.assert_allclose(got, hf_logprobs(hf_model, sample), atol=1e-5)


def with_siblings_visible(sample: TrainingSample) -> TrainingSample:
    return dataclasses.replace(sample, branch=np.minimum(sample.branch, 1))


def with_flattened_positions(sample: TrainingSample) -> TrainingSample:
    positions = np.arange(len(sample.token_ids), dtype=np.int32)
    return dataclasses.replace(sample, position_ids=positions)


def with_flattened_labels(sample: TrainingSample) -> TrainingSample:
    before = np.arange(-1, len(sample.token_ids) - 1, dtype=np.int32)
    learnt = sample.loss_mask | (sample.predecessor < 0)
    learnt[0] = False
    return dataclasses.replace(sample, predecessor=before, loss_mask=learnt)


@pytest.mark.parametrize(
    "spoil", [with_siblings_visible, with_flattened_positions, with_flattened_labels]
)
def test_parity_breaks_when_the_tree_is_ignored(spoil, samples, hf_model, hf_folder, tmp_path):
    spoilt = [spoil(sample) for sample in samples]
    scored = trainer_logprobs(spoilt, LAYOUTS["one"], hf_folder, tmp_path)
    for sample, got in zip(samples, scored, strict=True):
        assert np.abs(got - hf_logprobs(hf_model, sample)).max() > 1e-2
