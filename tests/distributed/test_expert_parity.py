"""Experts, Llama and padded vocabularies: every layout computes what one rank computes.

As ``test_parallel_parity``, for what dense Qwen3 does not have.
"""

from __future__ import annotations

import numpy as np
import pytest

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.parallel_check import parallel_problems
from npr_megatron.config.training import ParallelConfig
from tests.distributed import planted_experts
from tests.distributed.jobs import MODEL, TRAINER
from tests.distributed.models import LLAMA, MOE, UNTIED, with_dense_layers
from tests.distributed.parity import (
    GRADIENT,
    NORM,
    REPLICAS,
    ROWS,
    Run,
    compare,
    layout,
    require_complaint,
)

DENSE_FIRST = with_dense_layers(MOE, 2)
LAYOUTS = {
    "ep2": layout(MOE, dp_size=2, ep_size=2),
    "ep2 tp2 etp1": layout(MOE, tp_size=2, ep_size=2, etp_size=1),
    "ep2 tp2 etp2": layout(MOE, tp_size=2, dp_size=2, ep_size=2, etp_size=2),
    "ep2 dp4": layout(MOE, dp_size=4, ep_size=2, overlap_data_parallel=True),
    "ep4": layout(MOE, tp_size=2, dp_size=2, ep_size=4, etp_size=1),
    "ep2 pp2": layout(DENSE_FIRST, dp_size=2, pp_size=2, ep_size=2),
    "ep2 tp2 pp2 vpp2": layout(MOE, tp_size=2, pp_size=2, vpp_size=2, ep_size=2, etp_size=1),
    "ep2 cp2": layout(MOE, cp_size=2, ep_size=2),
    "etp2 over dp2": layout(MOE, dp_size=2, etp_size=2),
    "tp2 etp1": layout(MOE, tp_size=2, etp_size=1),
    "tp2 etp2": layout(MOE, tp_size=2),
    "llama tp2 pp2": layout(LLAMA, tp_size=2, pp_size=2),
    "tp2 padded": layout(UNTIED, tp_size=2, vocab_divisor=24),
    "tp2 padding alone on a rank": layout(MODEL, tp_size=2, vocab_divisor=64),
    "pp2 padded, tied": layout(MODEL, pp_size=2, vocab_divisor=24),
}
UNPACKED = ("ep2", "ep2 tp2 etp2")
FAULTS = {
    planted_experts.weights_of_experts_do_not_sum_to_one: ("ep2", GRADIENT),
    planted_experts.experts_change_places: ("ep2", GRADIENT),
    planted_experts.gradients_of_experts_are_divided_by_expert_ranks: (
        "ep2",
        rf"{GRADIENT} model.layers.\d.mlp.experts",
    ),
    planted_experts.experts_are_taken_for_a_part_of_their_layer: (
        "tp2 etp1",
        rf"{REPLICAS}.*mlp.experts",
    ),
    planted_experts.experts_count_on_the_first_tp_rank_only: ("ep2 tp2 etp1", NORM),
    planted_experts.routers_are_not_summed_over_tp: ("ep2 tp2 etp1", rf"{REPLICAS}.*mlp.gate"),
    planted_experts.padding_is_predicted: ("tp2 padded", GRADIENT),
}
"""Where each fault is planted, and what must be said of it."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_equals_one_rank(name, trainer):
    model, parallel = LAYOUTS[name]
    assert parallel_problems(parallel, TRAINER, model) == []
    kinds = ROWS if name in UNPACKED else ROWS[:1]
    for rows, found in zip(kinds, trainer.runs(model, parallel, kinds), strict=True):
        compare(found, trainer.run_alone(model, rows))
        assert largest_in_padding(found, model, parallel) == 0.0


def largest_in_padding(run: Run, model: ModelConfig, parallel: ParallelConfig) -> float:
    """Return the largest weight or gradient in a row of the vocabulary that is no token's."""
    largest = [0.0]
    num_rows = parallel.padded_vocab_size(model.vocab_size) // parallel.tp_size
    for number, rank in enumerate(run.ranks):
        first = number % parallel.tp_size * num_rows
        num_tokens = np.clip(model.vocab_size - first, 0, num_rows)
        for held in (rank.storages, rank.gradients):
            for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                largest += (
                    [np.abs(held[name][num_tokens:]).max(initial=0.0)] if name in held else []
                )
    return max(largest)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_shows(fault, trainer):
    name, complaint = FAULTS[fault]
    require_complaint(trainer, *LAYOUTS[name], fault, complaint)
