"""A training run of all ranks put together, and what it means that two runs are one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import LossConfig, ParallelConfig
from npr_megatron.data.packing import pack
from npr_megatron.train.step import StepBatch, StepResult
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL, Job, Learnt, check_weights, learn_one_by_one, whole_model
from tests.distributed.models import write_model
from tests.distributed.samples import branched_sample, step_batches

NUM_STEPS = 4
ROWS = ("packed", "unpacked")
TOLERANCE = 1e-5
GRADIENT, REPLICAS, NORM = "gradient of", "replicas differ", "grad_norm is"
"""How the complaints of a comparison begin."""


def layout(model: ModelConfig = MODEL, **parallel: Any) -> tuple[ModelConfig, ParallelConfig]:
    """Return what a layout is given by: the model, and how it is laid out."""
    return model, ParallelConfig(**parallel)


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


@cache
def batches_of(rows: str) -> tuple[StepBatch, ...]:
    """Return the steps of a run."""
    return step_batches("papo", NUM_STEPS) if rows == "packed" else unpacked_batches()


@dataclass(frozen=True)
class Run:
    """One training run, put together from its ranks."""

    results: list[StepResult]
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    ranks: tuple[Learnt, ...] = ()
    """What each rank saw and held."""


class Trainer:
    """Runs under a model, a layout and rows; of one rank each is computed once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._weights_of = cache(self._write)
        self._reference = cache(self._train_alone)

    def run(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        rows: str,
        fault: Callable[[], None] | None = None,
    ) -> Run:
        """Return the run of all ranks; ``fault`` breaks something in each of them first."""
        return self.runs(model, parallel, (rows,), fault)[0]

    def runs(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        rows: tuple[str, ...],
        fault: Callable[[], None] | None = None,
    ) -> list[Run]:
        """Return one run for each kind of rows, all by the same processes."""
        job = Job(
            hf_folder=self._weights_of(model.model_dump_json()), model=model, parallel=parallel
        )
        lives = tuple(batches_of(kind) for kind in rows)
        ranks = run_ranks(learn_one_by_one, parallel.world_size, self._folder, job, lives, fault)
        return [_put_together(life, model, parallel) for life in zip(*ranks, strict=True)]

    def run_alone(self, model: ModelConfig, rows: str) -> Run:
        """Return the run of one rank."""
        return self._reference(model.model_dump_json(), rows)

    def _write(self, model_json: str) -> Path:
        model = ModelConfig.model_validate_json(model_json)
        return write_model(self._folder / f"model-{abs(hash(model_json))}", model)

    def _train_alone(self, model_json: str, rows: str) -> Run:
        return self.run(ModelConfig.model_validate_json(model_json), ParallelConfig(), rows)


def _put_together(ranks: tuple[Learnt, ...], model: ModelConfig, parallel: ParallelConfig) -> Run:
    assert all(rank.results == ranks[0].results for rank in ranks), "ranks disagree"
    return Run(
        ranks[0].results,
        whole_model([rank.gradients for rank in ranks], model, parallel),
        whole_model([rank.storages for rank in ranks], model, parallel),
        ranks,
    )


def compare(found: Run, expected: Run) -> None:
    """Require that two runs are one: loss, every gradient and norm, and the weights that follow."""
    for name, gradient in expected.gradients.items():
        scale = np.abs(gradient).max()
        assert scale > 0, f"{name} gets no gradient"
        difference = np.abs(found.gradients[name] - gradient).max() / scale
        assert difference <= TOLERANCE, f"{GRADIENT} {name} differs by {difference:.1e}"
    for got, want in zip(found.results, expected.results, strict=True):
        for name in (
            "loss",
            "grad_norm",
            "mean_policy_logprob",
            "mean_entropy",
            "max_logprob_gap",
        ):
            a, b = getattr(got, name), getattr(want, name)
            assert abs(a - b) <= TOLERANCE * abs(b), f"{name} is {a}, not {b}"
        assert (got.num_loss_tokens, got.num_tokens) == (want.num_loss_tokens, want.num_tokens)
    check_weights(found.weights, expected.weights)


def require_complaint(
    trainer: Trainer,
    model: ModelConfig,
    parallel: ParallelConfig,
    fault: Callable[[], None],
    complaint: str,
) -> None:
    """Require that the comparison of packed rows finds ``fault`` and says ``complaint``."""
    expected = trainer.run_alone(model, "packed")
    with pytest.raises(AssertionError, match=complaint):
        compare(trainer.run(model, parallel, "packed", fault), expected)
