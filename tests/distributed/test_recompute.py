"""What backward computes again gives the same gradients, in every kind of layout."""

from __future__ import annotations

from typing import Any

import pytest

from npr_megatron.config.training import ParallelConfig
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL, TRAINER, Job, learn, whole_model
from tests.distributed.parity import Run, compare
from tests.distributed.samples import step_batches

LAYOUTS = {
    "tp2": ParallelConfig(tp_size=2),
    "pp2": ParallelConfig(pp_size=2),
    "pp2 vpp2": ParallelConfig(pp_size=2, vpp_size=2),
    "cp2": ParallelConfig(cp_size=2),
}
KINDS = ("none", "selective", "full")


def learn_each_way(rank: int, world_size: int, init_method: str, job: Job) -> list[Any]:
    """Return for each kind of recompute what was learnt, and how often modules ran."""
    from megatron.core.transformer.mlp import MLP

    from npr_megatron.model.attention import BranchCore
    from npr_megatron.model.norm import RMSNorm

    counts = {BranchCore: 0, MLP: 0, RMSNorm: 0}

    def counted(module: Any) -> None:
        original = module.forward

        def forward(self: Any, *args: Any, **keywords: Any) -> Any:
            counts[module] += 1
            return original(self, *args, **keywords)

        module.forward = forward

    for module in counts:
        counted(module)
    found = []
    for kind in KINDS:
        trainer = TRAINER.model_copy(update={"recompute": kind})
        before = dict(counts)
        learnt = learn(
            rank,
            world_size,
            f"{init_method}-{kind}",
            Job(**{**job.__dict__, "trainer": trainer}),
        )
        found.append((learnt, [counts[module] - before[module] for module in counts]))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_recomputed_training_is_the_same_training(name, hf_folder, tmp_path):
    parallel = LAYOUTS[name]
    job = Job(hf_folder=hf_folder, parallel=parallel, batches=step_batches("papo", 2))
    ranks = run_ranks(learn_each_way, 2, tmp_path, job)
    runs = []
    for number in range(len(KINDS)):
        learnt = tuple(rank[number][0] for rank in ranks)
        gradients = whole_model([each.gradients for each in learnt], MODEL, parallel)
        weights = whole_model([each.storages for each in learnt], MODEL, parallel)
        runs.append(Run(learnt[0].results, gradients, weights, learnt))
    for run in runs[1:]:
        compare(run, runs[0])
    for rank in ranks:
        none, selective, full = (counts for _, counts in rank)
        attention, mlps, norms = none
        assert selective == [2 * attention, 2 * mlps, norms]
        # The last norm of the model is behind the layers.
        assert full[:2] == [2 * attention, 2 * mlps] and 2 * norms - full[2] in (0, 8)
