"""Fleets: plans that do not grow, replicas in turn, nodes that get everything once."""

from __future__ import annotations

import numpy as np

from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.executors.inproc import execute
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.plans.diff import diff_plans
from npr_megatron.weights.plans.fleet import FleetTransfer, PlacedEngine
from npr_megatron.weights.plans.plan import plan_transfer
from npr_megatron.weights.proof.verify import verify_transfer
from npr_megatron.weights.storages import empty_storages
from npr_megatron.weights.tiles import Layout
from tests.unit.weights.oracles import (
    by_rank,
    element_ids,
    engine_storages,
    num_different,
    tiny_model,
    trainer_storages,
)

MODEL = tiny_model()
PARALLEL = ParallelConfig(tp_size=2, dp_size=3)
SOURCE = trainer_layout(MODEL, PARALLEL)
SMALL, LARGE = engine_layout(MODEL, 1), engine_layout(MODEL, 4)


def loads(plan) -> np.ndarray:
    sizes = plan.copy_table.num_elements
    return np.bincount(plan.copy_table.source_rank, weights=sizes, minlength=len(SOURCE.ranks))


def test_a_thousand_engines_need_as_many_plans_as_there_are_kinds_of_them():
    engines = [PlacedEngine(SMALL, (number // 2,)) for number in range(1000)]
    engines += [PlacedEngine(LARGE, (500 + n, 500 + n, 501 + n, 501 + n)) for n in range(0, 200, 2)]
    fleet = FleetTransfer(SOURCE, engines)
    assert len(fleet.class_plans) == 2
    assert len(fleet.units) == 500 + 100
    assert sorted(member for unit in fleet.units for member in unit.engines) == list(range(1100))


def test_every_unit_gets_every_element_by_a_plan_that_is_proven():
    engines = [
        PlacedEngine(SMALL, (0,)),
        PlacedEngine(LARGE, (1, 1, 2, 2)),
        PlacedEngine(SMALL, (0,)),
    ]
    fleet = FleetTransfer(SOURCE, engines)
    assert [unit.engines for unit in fleet.units] == [(0, 2), (1,)]
    ids = element_ids(MODEL)
    expected = [engine_storages(MODEL, 1, ids) * 2, engine_storages(MODEL, 4, ids)]
    for unit, served in zip(fleet.units, expected, strict=True):
        plan, target = fleet.plan_of(unit), fleet.targets[unit.class_index]
        assert verify_transfer(plan, SOURCE, target) == []
        arrived = [empty_storages(rank, next(iter(ids.values())).dtype) for rank in target.ranks]
        execute(plan, by_rank(trainer_storages(MODEL, PARALLEL, ids)), by_rank(arrived))
        assert num_different(arrived, served) == 0


def test_engines_of_one_class_ask_each_replica_in_turn():
    fleet = FleetTransfer(SOURCE, [PlacedEngine(LARGE, (node,) * 4) for node in range(3)])
    plans = [fleet.plan_of(unit) for unit in fleet.units]
    assert len(fleet.class_plans) == 1
    givers = np.stack([plan.copy_table.source_rank for plan in plans])
    # three data-parallel replicas: at every copy the three engines ask three different ones
    assert all(len(set(column)) == 3 for column in givers.T.tolist())
    total = sum(loads(plan) for plan in plans)
    assert total.max() <= 1.04 * total.mean()


def test_engines_that_share_nodes_through_others_are_planned_together():
    pairs = [(0, 0, 1, 1), (3, 3, 4, 4), (1, 1, 2, 2), (5, 5, 5, 5)]
    fleet = FleetTransfer(SOURCE, [PlacedEngine(LARGE, nodes) for nodes in pairs])
    assert [unit.engines for unit in fleet.units] == [(0, 2), (1,), (3,)]
    # node 1 holds halves of two engines, which are not the same half
    assert fleet.class_plans[0].target_nodes == (0, 0, 1, 1, 1, 1, 2, 2)
    assert fleet.class_plans[0].num_elements >= 2 * SMALL.ranks[0].num_elements


def test_engines_of_unlike_layouts_on_one_node_are_planned_apart():
    fleet = FleetTransfer(SOURCE, [PlacedEngine(SMALL, (0,)), PlacedEngine(LARGE, (0,) * 4)])
    assert [unit.engines for unit in fleet.units] == [(0,), (1,)]


def test_a_fleet_has_one_id_wherever_it_is_planned_and_another_if_anything_moves():
    engines = [PlacedEngine(LARGE, (node,) * 4) for node in range(3)]
    fleet_id = FleetTransfer(SOURCE, engines).fleet_id
    assert FleetTransfer(trainer_layout(MODEL, PARALLEL), engines).fleet_id == fleet_id
    assert FleetTransfer(SOURCE, engines[:2]).fleet_id != fleet_id
    apart = [*engines[:2], PlacedEngine(LARGE, (2, 2, 3, 3))]
    assert FleetTransfer(SOURCE, apart).fleet_id != fleet_id


def test_a_diff_names_what_is_taken_from_elsewhere_and_nothing_else():
    old = plan_transfer(SOURCE, LARGE, target_nodes=[0, 0, 1, 1])
    assert diff_plans(old, plan_transfer(SOURCE, LARGE, target_nodes=[0, 0, 1, 1])) == ()
    fleet = FleetTransfer(SOURCE, [PlacedEngine(LARGE, (0, 0, 1, 1))] * 1)
    turned = fleet.plan_of(fleet.units[0])
    assert diff_plans(old, turned) == ()
    smaller = Layout("trainer", SOURCE.ranks[:2])  # two replicas left
    changes = diff_plans(old, plan_transfer(smaller, LARGE, target_nodes=[0, 0, 1, 1]))
    left = [change for change in changes if change.before and change.before.source_rank >= 2]
    assert len(left) == sum(copy.source_rank >= 2 for copy in old.copies)
    for change in changes:
        if change.before is not None and change.after is not None:
            assert change.before.target_box == change.after.target_box
            assert f"was from source rank {change.before.source_rank} " in str(change)
    assert {str(change)[0] for change in changes} <= {"~", "+", "-"}
    assert not any(change.is_share for change in changes)
