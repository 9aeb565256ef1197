"""Every layout computes what one rank computes, and a broken mechanism shows.

Each layout takes four optimizer steps over packed rows and over rows of one sample each. Compared
are the loss and norms of every step, every gradient of the first, and the weights after the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.parallel_check import parallel_problems
from npr_megatron.config.training import LossConfig, ParallelConfig
from npr_megatron.data.packing import pack
from npr_megatron.train.step import StepBatch, StepResult
from tests.distributed import planted
from tests.distributed.conftest import write_model
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL, TRAINER, Job, check_weights, learn, whole_model
from tests.distributed.samples import branched_sample, step_batches

NUM_STEPS = 4
TOLERANCE = 1e-5
UNTIED = MODEL.model_copy(update={"tie_word_embeddings": False})
DEEP = UNTIED.model_copy(update={"num_hidden_layers": 8})


def layout(model: ModelConfig = MODEL, **parallel: Any) -> tuple[ModelConfig, ParallelConfig]:
    return model, ParallelConfig(**parallel)


LAYOUTS = {
    "tp2": layout(tp_size=2),
    "tp4 over two kv heads": layout(UNTIED, tp_size=4),
    "pp2": layout(pp_size=2),
    "pp4": layout(pp_size=4),
    "tp2 pp2": layout(tp_size=2, pp_size=2),
    "pp2 vpp2": layout(pp_size=2, vpp_size=2),
    "pp4 vpp2": layout(DEEP, pp_size=4, vpp_size=2),
    "pp2 vpp4": layout(DEEP, pp_size=2, vpp_size=4),
    "tp2 pp2 vpp2": layout(tp_size=2, pp_size=2, vpp_size=2),
    "pp2 uneven": layout(pp_size=2, num_layers_in_first_stage=1),
    "pp3 uneven": layout(pp_size=3, num_layers_in_first_stage=1, num_layers_in_last_stage=1),
    "pp3 counting": layout(
        UNTIED,
        pp_size=3,
        account_for_embedding_in_pipeline_split=True,
        account_for_loss_in_pipeline_split=True,
    ),
    "pp2 vpp2 by string": layout(pp_size=2, vpp_size=2, pipeline_layout="E|ttt|t|L"),
    "dp2": layout(dp_size=2),
    "dp2 overlapped": layout(dp_size=2, overlap_data_parallel=True),
    "tp2 dp2": layout(tp_size=2, dp_size=2),
    "tp2 dp2 overlapped": layout(tp_size=2, dp_size=2, overlap_data_parallel=True),
    "pp2 dp2 overlapped": layout(pp_size=2, dp_size=2, overlap_data_parallel=True),
    "cp2": layout(cp_size=2),
    "cp2 tp2": layout(cp_size=2, tp_size=2),
    "cp2 pp2": layout(cp_size=2, pp_size=2),
    "cp2 dp2 overlapped": layout(cp_size=2, dp_size=2, overlap_data_parallel=True),
    "cp4": layout(cp_size=4),
    "pp2 vpp2 dp2 overlapped": layout(pp_size=2, vpp_size=2, dp_size=2, overlap_data_parallel=True),
}
GRADIENT, REPLICAS = "gradient of", "replicas differ"
FAULTS = {
    planted.norms_are_not_summed_over_tp: ("tp2", REPLICAS),
    planted.tied_embedding_is_not_summed_over_pp: ("pp2", REPLICAS),
    planted.messages_are_batched: ("pp2 vpp2", GRADIENT),
    planted.chunks_run_in_the_wrong_order: ("pp2 vpp4", GRADIENT),
    planted.layers_of_a_stage_change_places: ("pp2 uneven", GRADIENT),
    planted.gradients_stay_with_their_replica: ("dp2", GRADIENT),
    planted.gradients_are_divided_by_replicas: ("tp2 dp2", GRADIENT),
    planted.weights_are_read_before_they_are_gathered: ("dp2 overlapped", REPLICAS),
    planted.rows_leak: ("tp2 pp2", GRADIENT),
    planted.keys_of_other_ranks_are_taken_for_ones_own: ("cp2", GRADIENT),
    planted.gradients_of_keys_stay_where_they_were_looked_at: ("cp2 tp2", GRADIENT),
}
"""Where each fault is planted, and what must be said of it: that nothing crashes is its point."""


@dataclass(frozen=True)
class Run:
    """One training run, put together from its ranks."""

    results: list[StepResult]
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]


def unpacked_batches() -> tuple[StepBatch, ...]:
    """Return steps in which no two samples share a row."""
    steps = []
    for seed in range(NUM_STEPS):
        rng = np.random.default_rng(seed)
        samples = [branched_sample(rng, num_blocks=2) for _ in range(16)]
        longest = max(len(sample.token_ids) for sample in samples)
        kept = [sample for sample in samples if 2 * len(sample.token_ids) > longest][:8]
        microbatches = pack(kept, longest, 2, 4)
        assert len(kept) == 8
        assert all(batch.segment.max() == 0 for batch in microbatches)
        steps.append(StepBatch(microbatches=microbatches, loss=LossConfig(kind="sft")))
    return tuple(steps)


BATCHES = {"packed": step_batches("papo", NUM_STEPS), "unpacked": unpacked_batches()}


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Callable[..., Run]:
    """Runs under a model, a layout and rows."""
    folder = tmp_path_factory.mktemp("parity")

    @cache
    def weights_of(model_json: str) -> Path:
        model = ModelConfig.model_validate_json(model_json)
        return write_model(folder / f"model-{abs(hash(model_json))}", model)

    def run(
        model: ModelConfig,
        parallel: ParallelConfig,
        rows: str,
        fault: Callable[[], None] | None = None,
    ) -> Run:
        job = Job(
            hf_folder=weights_of(model.model_dump_json()),
            model=model,
            parallel=parallel,
            batches=BATCHES[rows],
        )
        ranks = run_ranks(learn, parallel.world_size, folder, job, fault)
        assert all(rank.results == ranks[0].results for rank in ranks), "ranks disagree"
        return Run(
            ranks[0].results,
            whole_model([rank.gradients for rank in ranks], model, parallel),
            whole_model([rank.storages for rank in ranks], model, parallel),
        )

    return run


@pytest.fixture(scope="module")
def one_rank(train) -> Callable[[str, str], Run]:
    """The run of one rank under the model of a layout, each computed once."""

    @cache
    def reference(model_json: str, rows: str) -> Run:
        return train(ModelConfig.model_validate_json(model_json), ParallelConfig(), rows)

    return lambda name, rows: reference(LAYOUTS[name][0].model_dump_json(), rows)


def compare(found: Run, expected: Run) -> None:
    """Require that two runs are one."""
    for name, gradient in expected.gradients.items():
        scale = np.abs(gradient).max()
        assert scale > 0, f"{name} gets no gradient"
        difference = np.abs(found.gradients[name] - gradient).max() / scale
        assert difference <= TOLERANCE, f"gradient of {name} differs by {difference:.1e}"
    for got, want in zip(found.results, expected.results, strict=True):
        assert got.loss == pytest.approx(want.loss, rel=TOLERANCE)
        assert got.grad_norm == pytest.approx(want.grad_norm, rel=TOLERANCE)
        assert got.mean_policy_logprob == pytest.approx(want.mean_policy_logprob, rel=TOLERANCE)
        assert got.max_logprob_gap == pytest.approx(want.max_logprob_gap, rel=TOLERANCE)
        assert (got.num_loss_tokens, got.num_tokens) == (want.num_loss_tokens, want.num_tokens)
    check_weights(found.weights, expected.weights)


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_training_equals_one_rank(name, rows, train, one_rank):
    model, parallel = LAYOUTS[name]
    assert parallel_problems(parallel, TRAINER, model) == []
    compare(train(model, parallel, rows), one_rank(name, rows))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_shows(fault, train, one_rank):
    name, complaint = FAULTS[fault]
    expected = one_rank(name, "packed")
    with pytest.raises(AssertionError, match=complaint):
        compare(train(*LAYOUTS[name], "packed", fault), expected)
