"""Declared layouts against storages cut by tensor operations, and against published coordinates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import LayoutError
from npr_megatron.weights.layout import canonical_layout, engine_layout, trainer_layout
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


@settings(max_examples=40, deadline=None)
@given(topologies())
def test_tiles_say_what_cutting_the_tensors_says(topology: Topology):
    ids = element_ids(topology.model)
    assert num_different(filled(topology.source, ids), source_storages(topology, ids)) == 0
    assert num_different(filled(topology.target, ids), target_storages(topology, ids)) == 0


def test_canonical_layout_is_the_hf_tensors_themselves():
    model = tiny_model(tie_word_embeddings=False)
    ids = element_ids(model)
    assert num_different(filled(canonical_layout(model), ids), [ids]) == 0


BIG_GROUPS = {"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128}
SMALL_GROUPS = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}


@pytest.mark.parametrize(
    ("heads", "tp_size", "side", "hf_row", "trainer_place", "engine_places"),
    [
        (BIG_GROUPS, 16, "q", 512, (0, 512), [(1, 0)]),
        (BIG_GROUPS, 16, "k", 0, (3, 320), [(0, 512), (1, 512), (2, 512), (3, 512)]),
        (BIG_GROUPS, 16, "v", 511, (15, 575), [(12, 767), (13, 767), (14, 767), (15, 767)]),
        (SMALL_GROUPS, 2, "k", 128, (0, 1280), [(0, 2176)]),
    ],
)
def test_qkv_row_lies_where_megatron_and_sglang_put_it(
    heads, tp_size, side, hf_row, trainer_place, engine_places
):
    # worked out by hand from both formats
    model = tiny_model(num_hidden_layers=1, intermediate_size=16, **heads)
    trainer = trainer_layout(model, ParallelConfig(tp_size=tp_size))
    engine = engine_layout(model, tp_size)
    name = f"model.layers.0.self_attn.{side}_proj.weight"
    assert _places(trainer, name, hf_row) == [trainer_place]
    assert _places(engine, name, hf_row) == engine_places


def _places(layout: Layout, parameter: str, row: int) -> list[tuple[int, int]]:
    return [
        (rank, tile.at[0] + row - tile.box.start[0])
        for rank, rank_layout in enumerate(layout.ranks)
        for tile in rank_layout.tiles
        if tile.parameter == parameter and tile.box.start[0] <= row < tile.box.stop[0]
    ]


def test_gate_and_up_rows_of_one_shard_lie_on_top_of_each_other():
    model = tiny_model(intermediate_size=9728)
    layout = trainer_layout(model, ParallelConfig(tp_size=4))
    assert _places(layout, "model.layers.0.mlp.gate_proj.weight", 2432) == [(1, 0)]
    assert _places(layout, "model.layers.0.mlp.up_proj.weight", 2432) == [(1, 2432)]
    assert _places(layout, "model.layers.0.mlp.up_proj.weight", 9727) == [(3, 4863)]


def test_trainer_and_engine_hold_equal_bytes_when_each_rank_has_one_kv_head():
    model = tiny_model(num_key_value_heads=4)
    ids = element_ids(model)
    trainer = trainer_storages(model, ParallelConfig(tp_size=4), ids)
    engine = engine_storages(model, 4, ids)
    for mine, theirs in zip(trainer, engine, strict=True):
        qkv = mine["decoder.layers.0.self_attention.linear_qkv.weight"]
        assert torch.equal(qkv, theirs["layers.0.qkv_proj.weight"])


@pytest.mark.parametrize(("pp_size", "holders"), [(1, [0]), (2, [0, 1]), (4, [0, 3])])
def test_tied_head_is_a_second_copy_only_where_the_last_stage_is_not_the_first(pp_size, holders):
    layout = trainer_layout(tiny_model(), ParallelConfig(pp_size=pp_size))
    found = [rank for rank, _ in _places(layout, "model.embed_tokens.weight", 0)]
    assert found == holders


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


def test_fused_matrix_that_cannot_be_cut_into_whole_rows_is_refused():
    model = tiny_model(
        num_attention_heads=8, num_key_value_heads=1, head_dim=1, intermediate_size=8
    )
    with pytest.raises(LayoutError, match="fused qkv matrix has 10 rows"):
        trainer_layout(model, ParallelConfig(tp_size=8))


def test_layout_id_changes_with_the_topology_and_with_nothing_else():
    model = tiny_model()
    layouts = [
        trainer_layout(model, ParallelConfig(tp_size=2)),
        trainer_layout(model, ParallelConfig(dp_size=2)),
        trainer_layout(tiny_model(num_hidden_layers=2), ParallelConfig(tp_size=2)),
        engine_layout(model, 2),
        engine_layout(model, 1),
        canonical_layout(model),
    ]
    assert len({layout.layout_id for layout in layouts}) == len(layouts)
    again = trainer_layout(tiny_model(), ParallelConfig(tp_size=2))
    assert again.layout_id == layouts[0].layout_id
