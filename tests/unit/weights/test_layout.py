"""Declared layouts against storages cut by tensor operations; what cannot be laid out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from npr_megatron.config.model import MoeConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import LayoutError
from npr_megatron.weights.layouts import canonical_layout, engine_layout, trainer_layout
from npr_megatron.weights.names import canonical_parameters
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles
from npr_megatron.weights.tiles import Layout
from tests.unit.weights.oracles import (
    Tensors,
    Topology,
    element_ids,
    engine_storages,
    num_different,
    source_storages,
    target_storages,
    tiny_model,
    topologies,
    trainer_storages,
)


def filled(layout: Layout, weights: Tensors) -> list[Tensors]:
    """Storages of all ranks, loaded tile by tile; 0 where no tile reaches."""
    ranks = {id(rank): rank for rank in layout.ranks}  # replicas are often one object
    held = {key: empty_storages(rank, torch.int64) for key, rank in ranks.items()}
    for key, rank in ranks.items():
        load_tiles(rank, box_reader(weights), held[key])
    return [held[id(rank)] for rank in layout.ranks]


@settings(max_examples=100, deadline=None)
@given(topologies())
def test_tiles_say_what_cutting_the_tensors_says(topology: Topology):
    ids = element_ids(topology.model)
    assert num_different(filled(topology.source, ids), source_storages(topology, ids)) == 0
    assert num_different(filled(topology.target, ids), target_storages(topology, ids)) == 0


def test_canonical_layout_is_the_hf_tensors_themselves():
    model = tiny_model(tie_word_embeddings=False)
    ids = element_ids(model)
    assert num_different(filled(canonical_layout(model), ids), [ids]) == 0


def test_trainer_and_engine_hold_equal_bytes_when_each_rank_has_one_kv_head():
    model = tiny_model(num_key_value_heads=4)
    ids = element_ids(model)
    trainer = trainer_storages(model, ParallelConfig(tp_size=4), ids)
    engine = engine_storages(model, 4, ids)
    for mine, theirs in zip(trainer, engine, strict=True):
        qkv = mine["decoder.layers.0.self_attention.linear_qkv.weight"]
        assert torch.equal(qkv, theirs["layers.0.qkv_proj.weight"])


def test_tied_model_has_no_head_parameter_and_an_untied_one_has():
    names = {p.name for p in canonical_parameters(tiny_model())}
    untied = {p.name for p in canonical_parameters(tiny_model(tie_word_embeddings=False))}
    assert untied - names == {"lm_head.weight"}
    assert names <= untied


def test_sizes_that_do_not_divide_are_refused_all_at_once():
    model = tiny_model(num_attention_heads=9, num_key_value_heads=3, vocab_size=15)
    with pytest.raises(LayoutError) as refused:
        trainer_layout(model, ParallelConfig(tp_size=2, pp_size=3))
    message = str(refused.value)
    for problem in ("num_attention_heads 9", "num_hidden_layers 4", "heads 3 and"):
        assert problem in message
    with pytest.raises(LayoutError, match="vocab_size 15 is not a multiple of engine tp_size 2"):
        engine_layout(model, 2)


EXPERTS = MoeConfig(
    num_experts=4, num_experts_per_tok=1, moe_intermediate_size=4, shared_intermediate_size=4
)


@pytest.mark.parametrize(
    ("changes", "parallel", "sentence"),
    [
        (
            {"num_key_value_heads": 1, "head_dim": 1},
            {"tp_size": 8},
            "fused qkv matrix has 10 rows, not a multiple of parallel.tp_size 8",
        ),
        ({"num_key_value_heads": 3}, {}, "num_attention_heads 8 is not a multiple of"),
        ({"intermediate_size": 7}, {"tp_size": 2}, "intermediate_size 7 is not a multiple of"),
        ({}, {"ep_size": 2}, "ep_size 2 or etp_size None spreads experts and the model has none"),
        ({"moe": EXPERTS}, {"ep_size": 3, "dp_size": 3}, "num_experts 4 is not a multiple of"),
        ({"moe": EXPERTS}, {"ep_size": 4, "dp_size": 2}, r"does not divide the 2 ranks of a stage"),
        (
            {"moe": EXPERTS},
            {"etp_size": 3, "dp_size": 3},
            "moe_intermediate_size 4 is not a multiple of parallel.etp_size 3",
        ),
        (
            {"moe": EXPERTS},
            {"tp_size": 8},
            "moe_intermediate_size 4 is not a multiple of parallel.tp_size 8",
        ),
        (
            {"moe": EXPERTS},
            {"tp_size": 8, "etp_size": 1},
            "shared_intermediate_size 4 is not a multiple of parallel.tp_size 8",
        ),
        ({}, {"pipeline_layout": "E"}, "must end with its one L"),
    ],
)
def test_each_impossible_trainer_layout_has_its_sentence(changes, parallel, sentence):
    with pytest.raises(LayoutError, match=sentence):
        trainer_layout(tiny_model(**changes), ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("changes", "sizes", "sentence"),
    [
        ({"vocab_size": 15}, (2, 1), "vocab_size 15 is not a multiple of engine tp_size 2"),
        ({}, (2, 2), "engine ep_size 2 spreads experts and the model has none"),
        ({"moe": EXPERTS}, (4, 3), "engine ep_size 3 does not divide engine tp_size 4"),
        ({"moe": EXPERTS}, (8, 8), "num_experts 4 is not a multiple of engine ep_size 8"),
        ({"moe": EXPERTS}, (8, 1), "moe_intermediate_size 4 is not a multiple of engine tp_size /"),
        ({"moe": EXPERTS}, (8, 2), "shared_intermediate_size 4 is not a multiple of engine"),
    ],
)
def test_each_impossible_engine_layout_has_its_sentence(changes, sizes, sentence):
    with pytest.raises(LayoutError, match=sentence):
        engine_layout(tiny_model(**changes), *sizes)


def test_dense_widths_need_not_divide_where_every_layer_has_experts():
    model = tiny_model(intermediate_size=7, moe=EXPERTS)
    assert len(trainer_layout(model, ParallelConfig(tp_size=2)).ranks) == 2
    with_dense = EXPERTS.model_copy(update={"num_dense_layers": 1})
    with pytest.raises(LayoutError, match="intermediate_size 7 is not a multiple"):
        engine_layout(tiny_model(intermediate_size=7, moe=with_dense), 2)


def test_one_tile_in_a_wrong_place_is_seen():
    """The comparison can fail: each tile of each kind, moved by one row or filled from another."""
    model = tiny_model(moe=EXPERTS, num_hidden_layers=1, tie_word_embeddings=False)
    parallel = ParallelConfig(tp_size=2, dp_size=2, ep_size=2)
    ids = element_ids(model)
    expected = trainer_storages(model, parallel, ids)
    layout = trainer_layout(model, parallel)
    rank = layout.ranks[0]
    for index, tile in enumerate(rank.tiles):
        other = next(
            each
            for each in layout.ranks[3].tiles + rank.tiles
            if each.box.shape == tile.box.shape
            and (each.parameter, each.box) != (tile.parameter, tile.box)
        )
        wrong = replace(tile, parameter=other.parameter, box=other.box)
        tiles = (*rank.tiles[:index], wrong, *rank.tiles[index + 1 :])
        moved = Layout("trainer", (replace(rank, tiles=tiles), *layout.ranks[1:]))
        assert num_different(filled(moved, ids), expected) == tile.box.num_elements


def test_layout_id_changes_with_the_topology_and_with_nothing_else():
    model = tiny_model()
    layouts = [
        trainer_layout(model, ParallelConfig(tp_size=2)),
        trainer_layout(model, ParallelConfig(dp_size=2)),
        trainer_layout(tiny_model(num_hidden_layers=2), ParallelConfig(tp_size=2)),
        trainer_layout(model, ParallelConfig(tp_size=2, vocab_divisor=128)),
        trainer_layout(tiny_model(has_qk_norm=False), ParallelConfig(tp_size=2)),
        engine_layout(model, 2),
        engine_layout(model, 1),
        engine_layout(model, 1, engine="sglang"),
        canonical_layout(model),
    ]
    assert len({layout.layout_id for layout in layouts}) == len(layouts)
    again = trainer_layout(tiny_model(), ParallelConfig(tp_size=2))
    assert again.layout_id == layouts[0].layout_id
    copied = Layout("trainer", tuple(replace(rank) for rank in again.ranks))
    assert copied.layout_id == again.layout_id
    assert replace(again, kind="engine").layout_id != again.layout_id


def test_pinned_dtypes_are_part_of_the_layout():
    biased = EXPERTS.model_copy(update={"has_expert_bias": True})
    model = tiny_model(moe=biased, num_hidden_layers=1)
    for layout in (canonical_layout(model), trainer_layout(model, ParallelConfig())):
        pinned = [s for s in layout.ranks[0].storages if s.dtype is not None]
        assert [(s.shape, s.dtype) for s in pinned] == [((4,), "fp32")]
        bare = tuple(replace(s, dtype=None) for s in layout.ranks[0].storages)
        without = replace(layout, ranks=(replace(layout.ranks[0], storages=bare),))
        assert without.layout_id != layout.layout_id
