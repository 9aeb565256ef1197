"""TransformerEngine on a GPU: the same model in other modules, and training in FP8."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from npr_megatron.config.training import OptimizerConfig, ParallelConfig, TrainerConfig
from npr_megatron.runtime.fused_kernels import fp8_problem
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import Job, open_rank
from tests.distributed.models import UNTIED, write_model
from tests.distributed.samples import step_batches
from tests.distributed.test_fp8_params import check, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or find_spec("transformer_engine") is None,
        reason="needs a CUDA device and TransformerEngine",
    ),
]
MODEL = UNTIED.model_copy(update={"hidden_size": 256, "head_dim": 64, "intermediate_size": 512})
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=2)
NUM_STEPS = 20
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def trainer_config(**fields) -> TrainerConfig:
    return TrainerConfig(row_tokens=448, max_logprob_gap=100.0, **fields)


def learn(rank, world_size, init_method, job: Job, in_local_layers: bool):
    """Return the log-probs of the first batch, and the losses of all."""
    from npr_megatron.model import spec
    from npr_megatron.runtime.fused_kernels import FusedKernels

    if in_local_layers:
        spec.fused_kernels = lambda: FusedKernels("not wanted here", "not wanted here")
    trainer = open_rank(rank, world_size, init_method, job)
    if job.load_from is not None:
        trainer.load(job.load_from)
    logprobs = trainer.score(job.batches[0])
    losses = [trainer.train_step(batch).loss for batch in job.batches]
    if job.save_to is not None:
        trainer.save(job.save_to, {})
    trainer.close()
    return logprobs, losses


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("weights") / "model", MODEL)


@pytest.fixture
def run(weights, tmp_path):
    def trained(trainer: TrainerConfig, *, in_local_layers=False, num_steps=NUM_STEPS, **fields):
        batches = step_batches("sft", 4) * (num_steps // 4)
        job = Job(
            hf_folder=weights,
            model=MODEL,
            trainer=trainer,
            optimizer=OPTIMIZER,
            num_steps=10 * NUM_STEPS,
            batches=batches,
            **fields,
        )
        ((logprobs, losses),) = run_ranks(learn, 1, tmp_path, job, in_local_layers, timeout_s=600)
        return np.stack(logprobs), np.array(losses)

    return trained


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 2e-3), ("bf16", 5e-2)])
def test_its_layers_compute_what_megatrons_own_do(dtype, tolerance, run):
    logprobs, losses = run(trainer_config(dtype=dtype))
    local_logprobs, local_losses = run(trainer_config(dtype=dtype), in_local_layers=True)
    assert np.abs(logprobs - local_logprobs).max() <= tolerance
    np.testing.assert_allclose(losses, local_losses, rtol=tolerance)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_learns_as_bf16_does(recipe, run):
    if problem := fp8_problem(recipe, torch.cuda.get_device_capability(), ""):
        pytest.skip(problem)
    _, plain = run(trainer_config(dtype="bf16"))
    for fields in ({}, {"fp8_params": True}) if recipe != "delayed" else ({},):
        _, losses = run(trainer_config(dtype="bf16", fp8=recipe, **fields))
        assert not np.array_equal(losses, plain), "nothing was computed in FP8"
        np.testing.assert_allclose(losses, plain, rtol=0.05)
        assert plain[0] - plain[-1] > 5 * abs(losses[-1] - plain[-1])


def test_a_checkpoint_goes_over_to_megatrons_own_layers_and_back(run, tmp_path):
    fp8 = trainer_config(dtype="bf16", fp8="delayed")
    whole_logprobs, _ = run(fp8, num_steps=4, save_to=tmp_path / "a")
    plain = trainer_config(dtype="bf16")
    over, _ = run(plain, in_local_layers=True, num_steps=4, load_from=tmp_path / "a")
    again, _ = run(
        plain, in_local_layers=True, num_steps=4, load_from=tmp_path / "a", save_to=tmp_path / "b"
    )
    np.testing.assert_array_equal(over, again)
    assert np.abs(over - whole_logprobs).max() > 0, "the weights of the checkpoint were not read"
    back, _ = run(fp8, num_steps=4, load_from=tmp_path / "b")
    assert np.isfinite(back).all()


def test_blockwise_weights_are_published_as_the_quantiser_would(weights, tmp_path):
    if problem := fp8_problem("blockwise", torch.cuda.get_device_capability(), ""):
        pytest.skip(problem)
    trainer = trainer_config(dtype="bf16", fp8="blockwise", fp8_params=True)
    job = Job(
        hf_folder=weights,
        model=MODEL,
        parallel=ParallelConfig(),
        trainer=trainer,
        optimizer=OPTIMIZER,
        batches=step_batches("papo", 3),
    )
    (seen,) = run_ranks(train, 1, tmp_path, job, 128, (), timeout_s=600)
    check(seen)
