"""Every layout computes what one rank computes."""

from __future__ import annotations

import numpy as np
import pytest

from npr_megatron.config.training import ParallelConfig
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL, Job, gradients, train, whole_model
from tests.distributed.samples import step_batches

LAYOUTS = {
    "tp2": ParallelConfig(tp_size=2),
    "pp2": ParallelConfig(pp_size=2),
    "tp2_pp2": ParallelConfig(tp_size=2, pp_size=2),
    "dp2": ParallelConfig(dp_size=2),
}
NUM_STEPS = 5


def train_under(parallel, kind, hf_folder, tmp_path):
    job = Job(
        hf_folder=hf_folder,
        parallel=parallel,
        batches=step_batches(kind, NUM_STEPS),
    )
    outcomes = run_ranks(train, parallel.world_size, tmp_path, job)
    weights = whole_model([outcome.storages for outcome in outcomes], MODEL, parallel)
    return [outcome.results for outcome in outcomes], weights


@pytest.fixture(scope="module", params=["sft", "papo"])
def one_rank(request, hf_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-rank")
    results, weights = train_under(ParallelConfig(), request.param, hf_folder, folder)
    return request.param, results[0], weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_equals_one_rank(layout, one_rank, hf_folder, tmp_path):
    kind, expected, expected_weights = one_rank
    per_rank, weights = train_under(LAYOUTS[layout], kind, hf_folder, tmp_path)

    assert all(results == per_rank[0] for results in per_rank), "ranks disagree"
    for got, want in zip(per_rank[0], expected, strict=True):
        assert got.loss == pytest.approx(want.loss, rel=1e-4)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=1e-4)
        assert got.mean_policy_logprob == pytest.approx(want.mean_policy_logprob, rel=1e-5)
        assert got.max_logprob_gap == pytest.approx(want.max_logprob_gap, rel=1e-4)
        assert (got.num_loss_tokens, got.num_tokens) == (want.num_loss_tokens, want.num_tokens)
    for name, want_tensor in expected_weights.items():
        np.testing.assert_allclose(weights[name], want_tensor, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2_pp2"])
def test_gradients_equal_one_rank(layout, hf_folder, tmp_path):
    def gradient(parallel):
        job = Job(
            hf_folder=hf_folder,
            parallel=parallel,
            batches=step_batches("papo", 1),
        )
        held = run_ranks(gradients, parallel.world_size, tmp_path, job)
        return whole_model(held, MODEL, parallel)

    expected = gradient(ParallelConfig())
    for name, got in gradient(LAYOUTS[layout]).items():
        scale = np.abs(expected[name]).max()
        assert scale > 0, f"{name} gets no gradient"
        np.testing.assert_allclose(got, expected[name], atol=1e-5 * scale, err_msg=name)
