"""Qwen3-MoE and Llama 3 in the trainer are those of Hugging Face, before and after training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from npr_megatron.config.hf_architecture import read_trainable_architecture
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import LossConfig, ParallelConfig, TrainerConfig
from npr_megatron.data.packing import pack
from npr_megatron.records.sample import TrainingSample
from npr_megatron.train.step import StepBatch
from tests.distributed import planted_experts
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import Job, train
from tests.distributed.models import LLAMA, MOE, with_dense_layers, write_model
from tests.distributed.samples import branched_sample, step_batches
from tests.parity.test_trainer_hf import hf_logprobs, unpacked

MODELS = {
    "qwen3_moe": MOE,
    "qwen3_moe, dense first": with_dense_layers(MOE, 1),
    "llama 3": LLAMA,
}
WITHOUT_STRETCH = LLAMA.model_copy(update={"rope_scaling": None})


@pytest.fixture(scope="module")
def samples() -> list[TrainingSample]:
    rng = np.random.default_rng(5)
    return [branched_sample(rng, num_blocks=num_blocks) for num_blocks in (3, 4, 3)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: write_model(folder / str(n), MODELS[name]) for n, name in enumerate(MODELS)}


def hf_of(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def faulty(rank, world_size, init_method, job, fault):
    fault()
    return train(rank, world_size, init_method, job)


def scored(
    samples, model: ModelConfig, folder: Path, tmp_path, fault=None, **job
) -> list[np.ndarray]:
    """Return the trainer's [T] log-probs of every sample, computed from packed rows."""
    parallel = job.pop("parallel", ParallelConfig())
    batches = pack(samples, 640, 1, parallel.dp_size)
    to_score = StepBatch(microbatches=batches, loss=LossConfig(kind="sft"))
    asked = Job(hf_folder=folder, model=model, parallel=parallel, score=(to_score,), **job)
    if fault is None:
        outcomes = run_ranks(train, parallel.world_size, tmp_path, asked)
    else:
        outcomes = run_ranks(faulty, parallel.world_size, tmp_path, asked, fault)
    return [unpacked(batches, outcomes[0].logprobs[0], sample) for sample in samples]


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_of_branched_samples_equal_hf(name, samples, folders, tmp_path):
    hf = hf_of(folders[name])
    found = scored(samples, MODELS[name], folders[name], tmp_path)
    for sample, got in zip(samples, found, strict=True):
        np.testing.assert_allclose(got, hf_logprobs(hf, sample), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "model", "fault"),
    [
        ("llama 3", WITHOUT_STRETCH, None),
        ("qwen3_moe", MOE, planted_experts.weights_of_experts_do_not_sum_to_one),
        ("qwen3_moe", MOE, planted_experts.experts_change_places),
    ],
)
def test_parity_breaks_when_the_family_is_taken_for_another(
    name, model, fault, samples, folders, tmp_path
):
    hf = hf_of(folders[name])
    found = scored(samples, model, folders[name], tmp_path, fault)
    for sample, got in zip(samples, found, strict=True):
        assert np.abs(got - hf_logprobs(hf, sample)).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("qwen3_moe, dense first", ParallelConfig(tp_size=2, ep_size=2, etp_size=1)),
        ("llama 3", ParallelConfig(tp_size=2, vocab_divisor=24)),
    ],
)
def test_a_trained_model_reads_back_in_transformers(name, parallel, samples, folders, tmp_path):
    exported = tmp_path / "exported"
    found = scored(
        samples,
        MODELS[name],
        folders[name],
        tmp_path,
        parallel=parallel,
        batches=step_batches("sft", 2),
        export_to=exported,
    )
    assert read_trainable_architecture(exported) == MODELS[name]
    before, after = hf_of(folders[name]), hf_of(exported)
    assert after.get_input_embeddings().weight.shape[0] == MODELS[name].vocab_size
    for sample, got in zip(samples, found, strict=True):
        np.testing.assert_allclose(got, hf_logprobs(after, sample), atol=1e-5)
        assert np.abs(got - hf_logprobs(before, sample)).max() > 1e-2, "nothing was learnt"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_grouped_experts_on_cuda_equal_hf_but_for_bf16(samples, folders, tmp_path):
    hf = hf_of(folders["qwen3_moe"])
    trainer = TrainerConfig(dtype="bf16", max_logprob_gap=100.0)
    found = scored(samples, MOE, folders["qwen3_moe"], tmp_path, trainer=trainer)
    for sample, got in zip(samples, found, strict=True):
        gaps = np.abs(got - hf_logprobs(hf, sample))[sample.loss_mask]
        # A token whose experts are nearly as likely may get others in bf16.
        assert np.median(gaps) < 0.02
