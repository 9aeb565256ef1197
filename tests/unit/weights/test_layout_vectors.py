"""Coordinates worked out by hand from the formats of Megatron and SGLang."""

from __future__ import annotations

import time

import pytest

from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import LayoutError
from npr_megatron.planning.models import KNOWN_MODELS
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.tiles import Layout
from tests.unit.weights.oracles import tiny_model

BIG_GROUPS = {"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128}
SMALL_GROUPS = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
QWEN3_235B = KNOWN_MODELS["qwen3-235b-a22b"]
MEGATRON_ROWS = {1: 151936, 2: 152064, 4: 152064, 8: 152576, 16: 153600}
"""Vocabulary rows that Megatron's scripts give a model of 151,936 tokens, by tp."""


def places(layout: Layout, parameter: str, *at: int) -> list[tuple[int, ...]]:
    """Rank and storage coordinates of an element (trailing coordinates may be left out)."""
    found: list[tuple[int, ...]] = []
    for rank, rank_layout in enumerate(layout.ranks):
        for tile in rank_layout.tiles:
            start, stop = tile.box.start[: len(at)], tile.box.stop[: len(at)]
            if tile.parameter != parameter:
                continue
            if all(a <= x < b for a, x, b in zip(start, at, stop, strict=True)):
                extra = len(tile.at) - len(tile.box.start)
                inner = tile.at[extra : extra + len(at)]
                moved = [x - a + b for x, a, b in zip(at, start, inner, strict=True)]
                found.append((rank, *tile.at[:extra], *moved))
    return found


@pytest.mark.parametrize(
    ("heads", "tp_size", "side", "hf_row", "trainer_place", "engine_places"),
    [
        (BIG_GROUPS, 16, "q", 512, (0, 512), [(1, 0)]),
        (BIG_GROUPS, 16, "k", 0, (3, 320), [(0, 512), (1, 512), (2, 512), (3, 512)]),
        (BIG_GROUPS, 16, "v", 511, (15, 575), [(12, 767), (13, 767), (14, 767), (15, 767)]),
        (SMALL_GROUPS, 2, "k", 128, (0, 1280), [(0, 2176)]),
        (SMALL_GROUPS, 1, "k", 128, (0, 1280), [(0, 4224)]),
    ],
)
@pytest.mark.parametrize("engine", ["embedded", "sglang"])
def test_qkv_row_lies_where_megatron_and_sglang_put_it(
    heads, tp_size, side, hf_row, trainer_place, engine_places, engine
):
    model = tiny_model(num_hidden_layers=1, intermediate_size=16, **heads)
    name = f"model.layers.0.self_attn.{side}_proj.weight"
    trainer = trainer_layout(model, ParallelConfig(tp_size=tp_size))
    assert places(trainer, name, hf_row) == [trainer_place]
    assert places(engine_layout(model, tp_size, 1, engine), name, hf_row) == engine_places


@pytest.mark.parametrize(("tp_size", "num_heads"), [(4, 18), (8, 9), (16, 4.5), (32, 2.25)])
def test_a_shard_of_the_fused_matrix_may_end_inside_a_head(tp_size, num_heads):
    model = tiny_model(num_hidden_layers=1, intermediate_size=32, **BIG_GROUPS)
    layout = trainer_layout(model, ParallelConfig(tp_size=tp_size))
    for rank in layout.ranks:
        (fused,) = (s for s in rank.storages if s.name.endswith("linear_qkv.weight"))
        assert fused.shape[0] == num_heads * 128


def test_gate_and_up_rows_of_one_shard_lie_on_top_of_each_other():
    model = tiny_model(intermediate_size=9728)
    layout = trainer_layout(model, ParallelConfig(tp_size=4))
    assert places(layout, "model.layers.0.mlp.gate_proj.weight", 2432) == [(1, 0)]
    assert places(layout, "model.layers.0.mlp.up_proj.weight", 2432) == [(1, 2432)]
    assert places(layout, "model.layers.0.mlp.up_proj.weight", 9727) == [(3, 4863)]


@pytest.mark.parametrize("tp_size", MEGATRON_ROWS)
def test_vocabulary_is_padded_as_megatron_pads_it(tp_size):
    model = tiny_model(
        vocab_size=151936,
        num_attention_heads=16,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
    )
    layout = trainer_layout(model, ParallelConfig(tp_size=tp_size, vocab_divisor=128))
    shapes = [rank.storages[0].shape for rank in layout.ranks]
    assert shapes == [(MEGATRON_ROWS[tp_size] // tp_size, model.hidden_size)] * tp_size
    if tp_size == 8:
        assert places(layout, "model.embed_tokens.weight", 151643) == [(7, 18139)]
        engine = engine_layout(model, 8, engine="sglang")
        assert places(engine, "model.embed_tokens.weight", 151643) == [(7, 18699)]


def test_an_engine_rank_of_nothing_but_padding_has_no_tile():
    model = tiny_model(vocab_size=65)
    (*_, last) = engine_layout(model, 8, engine="sglang").ranks
    assert last.storages[0].shape == (16, 6)
    assert all(tile.storage != "model.embed_tokens.weight" for tile in last.tiles)
    with pytest.raises(LayoutError, match="padded vocab_size 128 is not a multiple"):
        engine_layout(model, 3, engine="sglang")


@pytest.mark.parametrize(("pp_size", "holders"), [(1, [0]), (2, [0, 1]), (4, [0, 3])])
def test_tied_head_is_a_second_copy_only_where_the_last_stage_is_not_the_first(pp_size, holders):
    layout = trainer_layout(tiny_model(), ParallelConfig(pp_size=pp_size))
    assert [rank for rank, _ in places(layout, "model.embed_tokens.weight", 0)] == holders


def test_an_expert_lies_on_the_rank_that_owns_it():
    """Expert 70 of 128: EP 16 of the trainer holds it as 6 of 8; of TP 8 x EP 4, as 6 of 32."""
    model = QWEN3_235B.model_copy(update={"num_hidden_layers": 1})
    parallel = ParallelConfig(tp_size=4, dp_size=8, ep_size=16, etp_size=2)
    trainer, engine = trainer_layout(model, parallel), engine_layout(model, 8, 4, "sglang")
    expert = "model.layers.0.mlp.experts.70"
    # ep rank 8, etp rank 1 of 2: rank 17; a shard has 768 rows of gate above 768 of up
    assert places(trainer, f"{expert}.gate_proj.weight", 1000, 5) == [(17, 232, 5)]
    assert places(trainer, f"{expert}.up_proj.weight", 1000, 5) == [(17, 1000, 5)]
    assert places(trainer, f"{expert}.down_proj.weight", 5, 1000) == [(17, 5, 232)]
    names = {tile.storage for tile in trainer.ranks[17].tiles if expert in tile.parameter}
    own = "decoder.layers.0.mlp.experts.local_experts.6"
    assert names == {f"{own}.linear_fc1.weight", f"{own}.linear_fc2.weight"}
    # engine rank 5 is part 1 of 2 of group 2
    assert places(engine, f"{expert}.gate_proj.weight", 1000, 5) == [(5, 6, 232, 5)]
    assert places(engine, f"{expert}.up_proj.weight", 1000, 5) == [(5, 6, 1000, 5)]
    assert places(engine, f"{expert}.down_proj.weight", 5, 1000) == [(5, 6, 5, 232)]


def test_the_largest_model_is_laid_out_in_about_a_second():
    parallel = ParallelConfig(
        tp_size=4,
        pp_size=4,
        dp_size=4,
        ep_size=16,
        etp_size=1,
        num_layers_in_first_stage=23,
        num_layers_in_last_stage=23,
        vocab_divisor=128,
    )
    start = time.process_time()
    trainer = trainer_layout(QWEN3_235B, parallel)
    engines = [engine_layout(QWEN3_235B, 8, ep_size, "sglang") for ep_size in (1, 8)]
    ids = {layout.layout_id for layout in (trainer, *engines)}
    assert time.process_time() - start < 4  # 1.1 s idle
    assert len(ids) == 3
    assert len({id(rank) for rank in trainer.ranks}) == 64


def test_replicas_are_one_object():
    parallel = ParallelConfig(tp_size=2, cp_size=2, dp_size=3, pp_size=2)
    layout = trainer_layout(tiny_model(), parallel)
    assert (len(layout.ranks), len({id(rank) for rank in layout.ranks})) == (24, 4)
