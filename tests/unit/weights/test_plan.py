"""Plans carried out on element ids, over random topologies; their cost and their determinism."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings

from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import LayoutError
from npr_megatron.weights.box import Box
from npr_megatron.weights.executors.inproc import execute
from npr_megatron.weights.layouts import canonical_layout, engine_layout, trainer_layout
from npr_megatron.weights.plans.plan import TransferPlan, plan_transfer
from npr_megatron.weights.proof.verify import verify_transfer
from npr_megatron.weights.proof.wire_minimum import fewest_wire_bytes
from npr_megatron.weights.storages import empty_storages
from npr_megatron.weights.tiles import Layout, Rows, Storage, Tile, rank_of, stack
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


def test_storages_of_equal_format_travel_in_one_copy_each():
    model = tiny_model(num_key_value_heads=4)
    plan = plan_transfer(trainer_layout(model, ParallelConfig(tp_size=4)), engine_layout(model, 4))
    assert len(plan.copies) == sum(len(rank.storages) for rank in engine_layout(model, 4).ranks)


PLAN_ELSEWHERE = """
import sys
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.plans.plan import plan_transfer
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


def test_target_boxes_that_overlap_in_part_are_refused():
    source = Layout("trainer", (rank_of([stack("w", [Rows("p", 0, 4)], width=2)]),))
    target = Layout(
        "engine",
        tuple(rank_of([stack("w", [Rows("p", *rows)], width=2)]) for rows in ((0, 3), (2, 4))),
    )
    with pytest.raises(LayoutError, match=r"p: engine boxes \[0:3, 0:2\] and \[2:4, 0:2\] overlap"):
        plan_transfer(source, target)


def grid(*boxes: tuple[int, int, int, int]) -> Layout:
    """Ranks that hold one box (row, row, column, column) of a parameter each."""
    ranks = []
    for top, bottom, left, right in boxes:
        box = Box((top, left), (bottom, right))
        storage = Storage("w", box.shape)
        ranks.append(rank_of([(storage, (Tile("p", box, "w", (0, 0)),))]))
    return Layout("grid", tuple(ranks))


def test_grids_are_cut_in_both_directions():
    quarters = grid((0, 2, 0, 3), (0, 2, 3, 6), (2, 4, 0, 3), (2, 4, 3, 6))
    thirds = grid((0, 4, 0, 2), (0, 4, 2, 4), (0, 4, 4, 6))
    for source, target in ((quarters, thirds), (thirds, quarters)):
        plan = plan_transfer(source, target)
        assert verify_transfer(plan, source, target) == []
        assert len(plan.copies) == 8  # the middle third meets all quarters, the others two each


def test_grids_that_overlap_in_a_corner_are_refused():
    whole = grid((0, 4, 0, 6))
    with pytest.raises(LayoutError, match=r"\[0:3, 0:3\] and \[2:4, 2:6\] overlap in part"):
        plan_transfer(grid((0, 3, 0, 3), (2, 4, 2, 6), (0, 2, 3, 6), (3, 4, 0, 2)), whole)


def pinned(dtype, name: str = "p", num_ranks: int = 1) -> Layout:
    piece = (Storage("w", (4,), dtype), (Tile(name, Box((0,), (4,)), "w", (0,)),))
    return Layout("pinned", (rank_of([piece]),) * num_ranks)


def test_another_dtype_is_refused_by_name():
    with pytest.raises(LayoutError, match=r"bias is fp32 in the .* and of the weights' dtype in"):
        plan_transfer(pinned("fp32", "bias"), pinned(None, "bias"))


def test_copies_know_their_dtype_and_bytes_follow_it():
    plan = plan_transfer(pinned("fp32"), pinned("fp32", num_ranks=2), weight_bytes=2)
    assert {copy.dtype for copy in plan.copies} == {"fp32"}
    assert plan.wire_bytes(2) == 2 * 4 * 4
    eight_bits = plan_transfer(pinned("fp8_e4m3"), pinned("fp8_e4m3"))
    assert eight_bits.wire_bytes(2) == 4


def stacked(*experts: int) -> Layout:
    tiles = [
        Tile(f"expert{e}", Box((0, 0), (2, 3)), "w", (place, 0, 0))
        for place, e in enumerate(experts)
    ]
    return Layout("stacked", (rank_of([(Storage("w", (len(experts), 2, 3)), tuple(tiles))]),))


def test_experts_find_their_place_in_a_stack():
    source, target = stacked(0, 1, 2), stacked(2, 0, 1)
    plan = plan_transfer(source, target)
    assert verify_transfer(plan, source, target) == []
    places = {(copy.source_start[0], copy.target_start[0]) for copy in plan.copies}
    assert places == {(0, 1), (1, 2), (2, 0)}
    assert {copy.shape for copy in plan.copies} == {(2, 3)}


def test_what_a_node_wants_several_times_crosses_the_wire_once():
    model = tiny_model()  # 2 kv heads
    source, target = trainer_layout(model, ParallelConfig()), engine_layout(model, 8)
    alone = plan_transfer(source, target)
    together = plan_transfer(source, target, target_nodes=[0] * 8)
    whole = sum(rank.num_elements for rank in canonical_layout(model).ranks)
    assert (alone.shares, together.num_elements) == ((), whole)
    assert alone.num_elements == sum(rank.num_elements for rank in target.ranks)
    moved_on = sum(copy.num_elements for copy in together.shares)
    assert together.num_elements + moved_on == alone.num_elements
    # what is shared arrives at all ranks of the node alike
    received = Counter()
    for copy in together.copies:
        received[copy.target_rank] += copy.num_elements
    assert max(received.values()) <= 1.02 * whole / 8 + model.hidden_size


def test_what_a_node_already_holds_stays_on_it():
    model = tiny_model()
    source = trainer_layout(model, ParallelConfig(dp_size=2))
    target = engine_layout(model, 2)
    # a trainer replica on the node of either engine rank: nothing needs to cross
    plan = plan_transfer(source, target, target_nodes=[0, 1], source_nodes=[0, 1])
    assert verify_transfer(plan, source, target) == []
    assert plan.wire_bytes(2) == 0
    assert {(copy.source_rank, copy.target_rank) for copy in plan.copies} == {(0, 0), (1, 1)}
    assert plan_transfer(source, target, source_nodes=[0, 1]).wire_bytes(2) == 0  # each its own
    halves = trainer_layout(model, ParallelConfig(tp_size=2))
    half = plan_transfer(halves, target, target_nodes=[0, 1], source_nodes=[0, 7])
    assert verify_transfer(half, halves, target) == []
    least = fewest_wire_bytes(halves, target, target_nodes=[0, 1], source_nodes=[0, 7])
    assert 0 < half.wire_bytes(2) == sum(least.values()) < 2 * half.num_elements


def test_givers_begin_with_different_takers():
    model = tiny_model()
    source = trainer_layout(model, ParallelConfig(tp_size=4))
    plan = plan_transfer(source, engine_layout(model, 4))
    for rank in range(4):
        copies = plan.copies_from(rank)
        takers = [copy.target_rank for copy in copies]
        assert [(taker - rank) % 4 for taker in takers] == sorted((t - rank) % 4 for t in takers)
        assert sorted(copies) == sorted(c for c in plan.copies if c.source_rank == rank)
        assert plan.copies_to(rank) == tuple(c for c in plan.copies if c.target_rank == rank)


def test_boxes_intersect_where_both_reach():
    assert Box((0, 0), (4, 4)).intersect(Box((2, 3), (9, 9))) == Box((2, 3), (4, 4))
    assert Box((0, 0), (4, 4)).intersect(Box((4, 0), (5, 4))) is None
