"""Every layout computes what one rank computes, and a broken mechanism shows.

Each layout takes four optimizer steps over packed rows and over rows of one sample each. Compared
are the loss and norms of every step, every gradient of the first, and the weights after the last.
"""

from __future__ import annotations

import pytest

from npr_megatron.config.parallel_check import parallel_problems
from tests.distributed import planted
from tests.distributed.jobs import TRAINER
from tests.distributed.models import UNTIED
from tests.distributed.parity import GRADIENT, REPLICAS, ROWS, compare, layout, require_complaint

DEEP = UNTIED.model_copy(update={"num_hidden_layers": 8})

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


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_equals_one_rank(name, trainer):
    model, parallel = LAYOUTS[name]
    assert parallel_problems(parallel, TRAINER, model) == []
    for rows, found in zip(ROWS, trainer.runs(model, parallel, ROWS), strict=True):
        compare(found, trainer.run_alone(model, rows))


@pytest.mark.parametrize("name", ["cp2 tp2", "pp2 vpp2"])
def test_training_by_segments_equals_one_rank_under_a_mask(name, trainer):
    model, parallel = LAYOUTS[name]
    found = trainer.run(model, parallel, "packed", planted.attention_is_by_segments)
    compare(found, trainer.run_alone(model, "packed"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_shows(fault, trainer):
    name, complaint = FAULTS[fault]
    require_complaint(trainer, *LAYOUTS[name], fault, complaint)
