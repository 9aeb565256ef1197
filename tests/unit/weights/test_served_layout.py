"""Quantised layouts: every block has one scale in one known place; engines hold whole blocks."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import LayoutError
from npr_megatron.weights.layouts import canonical_layout, engine_layout, trainer_layout
from npr_megatron.weights.layouts.served import (
    Quantisation,
    quantised_layout,
    scales_of,
    straddling_blocks,
)
from npr_megatron.weights.names import canonical_parameters
from npr_megatron.weights.plans.plan import plan_transfer
from npr_megatron.weights.proof.verify import verify_transfer
from npr_megatron.weights.tiles import Layout, RankLayout
from tests.unit.weights.oracles import tiny_model, topologies

QWEN3_235B = ModelConfig(
    num_hidden_layers=1,
    hidden_size=4096,
    num_attention_heads=64,
    num_key_value_heads=4,
    head_dim=128,
    intermediate_size=1536,
    vocab_size=256,
)


def block_numbers(quantisation: Quantisation) -> dict[str, np.ndarray]:
    """Each scale and each element of a quantised parameter, labelled with the number of its block.

    Numbers start at 1 and never repeat.
    """
    labels: dict[str, np.ndarray] = {}
    first, size = 1, quantisation.block_size
    for name, (height, width) in quantisation.shapes.items():
        grid = -(-height // size), -(-width // size)
        numbers = np.arange(first, first + grid[0] * grid[1]).reshape(grid)
        first += numbers.size
        labels[scales_of(name)] = numbers
        labels[name] = numbers.repeat(size, 0).repeat(size, 1)[:height, :width]
    return labels


def filled(rank_layout: RankLayout, labels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    held = {s.name: np.zeros(s.shape, np.int64) for s in rank_layout.storages}
    for tile in rank_layout.tiles:
        if tile.parameter in labels:
            region = held[tile.storage][tile.storage_box.slices]
            region[...] = labels[tile.parameter][tile.box.slices].reshape(region.shape)
    return held


def coverage_problems(layout: Layout, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Paint distinct boxes of each parameter: every element must be painted exactly once."""
    boxes = defaultdict(set)
    for rank_layout in layout.ranks:
        for tile in rank_layout.tiles:
            boxes[tile.parameter].add(tile.box)
    problems = [f"{name} is not in the layout" for name in shapes.keys() - boxes.keys()]
    for name, distinct in boxes.items():
        painted = np.zeros(shapes[name], np.int64)
        for box in distinct:
            painted[box.slices] += 1
        if (painted != 1).any():
            problems.append(f"{name} is painted {painted.min()} to {painted.max()} times")
    return problems


def shapes_with_scales(model: ModelConfig, quantisation: Quantisation):
    shapes = {parameter.name: parameter.shape for parameter in canonical_parameters(model)}
    return shapes | {scales_of(name): quantisation.grid(name) for name in quantisation.shapes}


@settings(max_examples=40, deadline=None)
@given(topology=topologies(), block=st.integers(1, 6))
def test_served_sources_hold_every_element_and_every_scale(topology, block):
    model = topology.model
    quantisation = Quantisation.of(model, block)
    served = quantised_layout(topology.source, quantisation, may_straddle=True)
    assert coverage_problems(served, shapes_with_scales(model, quantisation)) == []
    expected = {parameter.name: parameter.dtype for parameter in canonical_parameters(model)}
    expected |= dict.fromkeys(quantisation.shapes, "fp8_e4m3")
    expected |= dict.fromkeys(map(scales_of, quantisation.shapes), "fp32")
    labels = block_numbers(quantisation)
    for rank_layout in served.ranks:
        dtypes = {storage.name: storage.dtype for storage in rank_layout.storages}
        for tile in rank_layout.tiles:
            assert dtypes[tile.storage] == expected[tile.parameter]
        held = filled(rank_layout, labels)
        for tile in rank_layout.tiles:  # an owner of a scale holds the first element of its block
            if tile.parameter in quantisation.shapes and scales_of(tile.storage) in held:
                first = labels[tile.parameter][::block, ::block]
                owned = set(held[scales_of(tile.storage)].flatten()) & set(first.flatten())
                assert owned <= set(held[tile.storage].flatten())


@settings(max_examples=40, deadline=None)
@given(topology=topologies(), block=st.integers(1, 4))
def test_an_engine_finds_the_scale_of_each_element_in_its_place(topology, block):
    model, quantisation = topology.model, Quantisation.of(topology.model, block)
    try:
        served = quantised_layout(topology.target, quantisation)
    except LayoutError:
        assume(False)
    assert coverage_problems(served, shapes_with_scales(model, quantisation)) == []
    for rank_layout in served.ranks:
        held = filled(rank_layout, block_numbers(quantisation))
        for storage in rank_layout.storages:
            if storage.dtype == "fp8_e4m3":
                labels, scales = held[storage.name], held[f"{storage.name}_scale_inv"]
                for index in np.ndindex(*labels.shape):
                    place = (*index[:-2], index[-2] // block, index[-1] // block)
                    assert scales[place] == labels[index]


@settings(max_examples=40, deadline=None)
@given(topology=topologies(), block=st.integers(2, 6))
def test_straddling_blocks_are_those_that_a_holder_does_not_hold_whole(topology, block):
    quantisation = Quantisation.of(topology.model, block)
    source, found = topology.source, {}
    for shared in straddling_blocks(source, quantisation):
        for offset in np.ndindex(*shared.blocks.shape):
            place = tuple(np.add(shared.blocks.start, offset).tolist())
            assert (shared.parameter, place) not in found
            found[shared.parameter, place] = shared.ranks
    assert found == slow_straddling_blocks(source, quantisation)


def slow_straddling_blocks(layout: Layout, quantisation: Quantisation):
    size, shared = quantisation.block_size, {}
    for name, shape in quantisation.shapes.items():
        held = np.zeros((len(layout.ranks), *shape), bool)
        for rank, rank_layout in enumerate(layout.ranks):
            for tile in rank_layout.tiles:
                if tile.parameter == name:
                    held[rank][tile.box.slices] = True
        for i, j in np.ndindex(*quantisation.grid(name)):
            block = held[:, i * size : (i + 1) * size, j * size : (j + 1) * size]
            by_rank = block.reshape(len(block), -1)
            if (by_rank.any(1) & ~by_rank.all(1)).any():
                shared[name, (i, j)] = tuple(np.flatnonzero(by_rank.any(1)).tolist())
    return shared


@settings(max_examples=15, deadline=None)
@given(topology=topologies(), block=st.integers(1, 4))
def test_planner_and_verifier_take_quantised_layouts_for_ordinary_ones(topology, block):
    model, quantisation = topology.model, Quantisation.of(topology.model, block)
    source = quantised_layout(topology.source, quantisation, may_straddle=True)
    target = quantised_layout(canonical_layout(model), quantisation)
    assert verify_transfer(plan_transfer(source, target), source, target) == []


def test_scales_of_a_canonical_layout_are_what_an_hf_checkpoint_has():
    model = tiny_model(num_hidden_layers=1, hidden_size=10)
    served = quantised_layout(canonical_layout(model), Quantisation.of(model, 4))
    stored = {storage.name: storage for storage in served.ranks[0].storages}
    scales = stored["model.layers.0.mlp.down_proj.weight_scale_inv"]
    assert (scales.shape, scales.dtype) == ((3, 2), "fp32")
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == "fp8_e4m3"
    assert stored["model.embed_tokens.weight"].dtype is None
    assert stored["model.layers.0.input_layernorm.weight"].dtype is None
    assert len(stored) == len(canonical_parameters(model)) + 7


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 6, 12])
def test_degrees_that_leave_blocks_whole_are_taken(tp_size):
    model = QWEN3_235B.model_copy(update={"num_attention_heads": 48, "num_key_value_heads": 12})
    quantised_layout(
        engine_layout(model.model_copy(update={"vocab_size": 768}), tp_size), Quantisation.of(model)
    )


def test_a_degree_that_cuts_blocks_is_refused_with_those_that_do_not():
    with pytest.raises(LayoutError) as refused:
        quantised_layout(engine_layout(QWEN3_235B, 8), Quantisation.of(QWEN3_235B))
    lines = str(refused.value).splitlines()
    assert len(lines) == 3  # gate, up and down, each once for all ranks and layers
    assert (
        "model.layers.*.mlp.down_proj.weight [4096, 1536] is cut into parts of 4096 x 192, "
        "FP8 needs whole blocks of 128 x 128" in lines[2]
    )
    assert lines[2].endswith("1, 2, 3, 4, 6, 12 equal parts along columns")


def test_a_fused_neighbour_with_ragged_rows_is_refused():
    model = tiny_model(head_dim=3, hidden_size=8)
    with pytest.raises(LayoutError, match=r"v_proj.* begins at \[30, 0\] of layers\.\*\.qkv_proj"):
        quantised_layout(engine_layout(model), Quantisation.of(model, 4))


def test_a_storage_is_quantised_whole_or_not_at_all():
    model = tiny_model()
    shapes = dict(Quantisation.of(model, 2).shapes)
    del shapes["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(LayoutError, match=r"layers\.1\.gate_up_proj.*only some can be quantised"):
        quantised_layout(engine_layout(model), Quantisation(shapes, 2))


def test_the_wide_model_straddles_nowhere_at_tp_4_and_in_known_places_at_tp_16():
    quantisation = Quantisation.of(QWEN3_235B)
    aligned = trainer_layout(QWEN3_235B, ParallelConfig(tp_size=4))
    assert straddling_blocks(aligned, quantisation) == ()
    shared = straddling_blocks(trainer_layout(QWEN3_235B, ParallelConfig(tp_size=16)), quantisation)
    # fc1 and fc2 in parts of 96; fused qkv in 4.5 heads of 128
    assert {s.parameter.split(".")[-2] for s in shared} >= {"gate_proj", "up_proj", "down_proj"}
    down = [s for s in shared if "down_proj" in s.parameter]
    assert down[0].blocks.start == (0, 0)
    assert down[0].blocks.shape == (32, 1)
    assert down[0].ranks == (0, 1)
    heads = [(s.blocks.start[0], s.ranks) for s in shared if "q_proj" in s.parameter]
    assert heads == [  # 18 heads a group: 16 of queries, then the key and the value
        (16 * group + head, (4 * group + first, 4 * group + first + 1))
        for group in range(4)
        for head, first in ((4, 0), (13, 2))
    ]
    assert not [s for s in shared if "k_proj" in s.parameter or "v_proj" in s.parameter]
