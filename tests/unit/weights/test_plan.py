"""Plans carried out on element ids, over random topologies; their cost and their determinism."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import LayoutError
from npr_megatron.weights.box import Box
from npr_megatron.weights.executors.inproc import execute
from npr_megatron.weights.layout import canonical_layout, engine_layout, trainer_layout
from npr_megatron.weights.plan import TransferPlan, plan_transfer
from npr_megatron.weights.storages import empty_storages
from npr_megatron.weights.tiles import Layout, Rows, rank_of, stack
from npr_megatron.weights.verify import verify_transfer
from tests.unit.weights.oracles import (
    Topology,
    by_rank,
    element_ids,
    engine_storages,
    num_different,
    tiny_model,
    topologies,
    trainer_storages,
)


def moved(plan: TransferPlan, sources, target: Layout):
    """Target storages after the plan; 0 where nothing was written."""
    targets = [empty_storages(rank, torch.int64) for rank in target.ranks]
    execute(plan, by_rank(sources), by_rank(targets))
    return targets


@settings(max_examples=30, deadline=None)
@given(topologies("both above kv heads"))
def test_every_element_arrives_on_every_random_topology(topology: Topology):
    model, parallel = topology.model, topology.parallel
    ids = element_ids(model)
    source = trainer_layout(model, parallel)
    target = engine_layout(model, topology.engine_tp_size)
    plan = plan_transfer(source, target)
    assert verify_transfer(plan, source, target) == []
    arrived = moved(plan, trainer_storages(model, parallel, ids), target)
    assert num_different(arrived, engine_storages(model, topology.engine_tp_size, ids)) == 0
    # the fewest bytes there can be: each element of each tile once
    tiles = [tile for rank in target.ranks for tile in rank.tiles]
    assert plan.num_elements == sum(tile.box.num_elements for tile in tiles)


@settings(max_examples=15, deadline=None)
@given(topologies("dense"))
def test_weights_come_back_from_an_engine_into_another_trainer_topology(topology: Topology):
    model = topology.model
    ids = element_ids(model)
    engine = engine_layout(model, topology.engine_tp_size)
    trainer = trainer_layout(model, topology.parallel)
    plan = plan_transfer(engine, trainer)
    assert verify_transfer(plan, engine, trainer) == []
    arrived = moved(plan, engine_storages(model, topology.engine_tp_size, ids), trainer)
    assert num_different(arrived, trainer_storages(model, topology.parallel, ids)) == 0


def test_export_is_a_transfer_to_the_canonical_layout():
    model, parallel = tiny_model(), ParallelConfig(tp_size=4, pp_size=2, dp_size=2)
    ids = element_ids(model)
    target = canonical_layout(model)
    plan = plan_transfer(trainer_layout(model, parallel), target)
    assert num_different(moved(plan, trainer_storages(model, parallel, ids), target), [ids]) == 0


def loads(plan: TransferPlan, num_ranks: int) -> list[int]:
    sums = [0] * num_ranks
    for copy in plan.copies:
        sums[copy.source_rank] += math.prod(copy.shape)
    return sums


@pytest.mark.parametrize("dp_size", [2, 3, 8])
@pytest.mark.parametrize("engine_tp_size", [1, 4])
def test_replicas_share_the_load_evenly(dp_size, engine_tp_size):
    # a small model whose embedding is a third of it, the hardest to spread
    model = tiny_model(
        num_hidden_layers=8,
        hidden_size=1024,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=100_000,
    )
    source = trainer_layout(model, ParallelConfig(dp_size=dp_size))
    per_rank = loads(plan_transfer(source, engine_layout(model, engine_tp_size)), dp_size)
    assert max(per_rank) <= 1.05 * sum(per_rank) / dp_size


def test_storages_of_equal_format_travel_in_one_copy_each():
    model = tiny_model(num_key_value_heads=4)
    plan = plan_transfer(trainer_layout(model, ParallelConfig(tp_size=4)), engine_layout(model, 4))
    assert len(plan.copies) == sum(len(rank.storages) for rank in engine_layout(model, 4).ranks)


PLAN_ELSEWHERE = """
import sys
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.layout import engine_layout, trainer_layout
from npr_megatron.weights.plan import plan_transfer
model = ModelConfig.model_validate_json(sys.argv[1])
parallel = ParallelConfig.model_validate_json(sys.argv[2])
print(plan_transfer(trainer_layout(model, parallel), engine_layout(model, 4)).plan_id)
assert "torch" not in sys.modules
"""


def test_plan_is_equal_in_another_process_with_another_hash_seed_and_needs_no_torch():
    model, parallel = tiny_model(), ParallelConfig(tp_size=2, pp_size=2, dp_size=2)
    arguments = [model.model_dump_json(), parallel.model_dump_json()]
    elsewhere = subprocess.run(
        [sys.executable, "-c", PLAN_ELSEWHERE, *arguments],
        env={"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = plan_transfer(trainer_layout(model, parallel), engine_layout(model, 4))
    assert elsewhere.stdout.strip() == here.plan_id


def test_layouts_of_different_models_are_refused():
    source = trainer_layout(tiny_model(num_hidden_layers=2), ParallelConfig())
    with pytest.raises(LayoutError, match=r"model\.layers\.2\."):
        plan_transfer(source, engine_layout(tiny_model()))


def test_source_boxes_that_overlap_in_part_are_refused():
    def rows(start: int, stop: int):
        return rank_of([stack("w", [Rows("p", start, stop)], width=2)])

    source = Layout("trainer", (rows(0, 3), rows(2, 4)))
    with pytest.raises(LayoutError, match="overlap in part"):
        plan_transfer(source, Layout("engine", (rows(0, 4),)))


def test_boxes_intersect_where_both_reach():
    assert Box((0, 0), (4, 4)).intersect(Box((2, 3), (9, 9))) == Box((2, 3), (4, 4))
    assert Box((0, 0), (4, 4)).intersect(Box((4, 0), (5, 4))) is None
