"""Quantising shards where they are gives the bytes of quantising whole matrices, always."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import DivergenceError, LayoutError
from npr_megatron.weights.executors.inproc import execute
from npr_megatron.weights.layouts import canonical_layout, engine_layout, trainer_layout
from npr_megatron.weights.layouts.served import (
    Quantisation,
    quantised_layout,
    scales_of,
    straddling_blocks,
)
from npr_megatron.weights.names import canonical_parameters
from npr_megatron.weights.plans.plan import plan_transfer
from npr_megatron.weights.quantise import quantise
from npr_megatron.weights.source_quantiser import SourceQuantiser
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles
from npr_megatron.weights.tiles import Layout
from tests.unit.weights.oracles import Tensors, by_rank, tiny_model, topologies

RULES = ("exact", "power_of_two")


def random_weights(model, seed: int, dtype: torch.dtype) -> Tensors:
    """Magnitudes that differ from row to row, so that the parts of a block have unequal amax."""
    generator = torch.Generator().manual_seed(seed)
    weights: Tensors = {}
    for parameter in canonical_parameters(model):
        values = torch.randn(parameter.shape, generator=generator)
        rows = (parameter.shape[0], *[1] * (values.dim() - 1))
        values *= 2.0 ** torch.randint(-6, 6, rows, generator=generator)
        weights[parameter.name] = values if parameter.dtype == "fp32" else values.to(dtype)
    return weights


def whole_matrices(weights: Tensors, quantisation: Quantisation) -> Tensors:
    """What an FP8 checkpoint of ``weights`` holds."""
    served: Tensors = {}
    for name, weight in weights.items():
        if name in quantisation.shapes:
            quantised, scales = quantise(weight, quantisation.block_size, quantisation.rule)
            served |= {name: quantised, scales_of(name): scales}
        else:
            served[name] = weight
    return served


def filled(layout: Layout, weights: Tensors, dtype: torch.dtype) -> list[Tensors]:
    held = [empty_storages(rank_layout, dtype) for rank_layout in layout.ranks]
    for rank_layout, storages in zip(layout.ranks, held, strict=True):
        load_tiles(rank_layout, box_reader(weights), storages)
    return held


def quantised_by_ranks(
    layout: Layout,
    served: Layout,
    quantisation: Quantisation,
    storages: list[Tensors],
    *,
    dtype: torch.dtype = torch.bfloat16,
    exchange: bool = True,
) -> list[Tensors]:
    """Every rank of ``layout`` in turn, with the collective maximum taken by hand."""
    ranks = [SourceQuantiser(layout, served, quantisation, rank) for rank in range(len(storages))]
    maxima = [rank.measure(held) for rank, held in zip(ranks, storages, strict=True)]
    if exchange:
        highest = torch.stack([one.shared for one in maxima]).amax(0)
        for one in maxima:
            one.shared.copy_(highest)
    written = [empty_storages(rank_layout, dtype) for rank_layout in served.ranks]
    for rank, held, one, into in zip(ranks, storages, maxima, written, strict=True):
        rank.write(held, one, into)
    return written


def num_different_bytes(found: list[Tensors], expected: list[Tensors]) -> int:
    assert [one.keys() for one in found] == [one.keys() for one in expected]
    return sum(
        int((one[name].view(torch.uint8) != other[name].view(torch.uint8)).sum())
        for one, other in zip(found, expected, strict=True)
        for name in one
    )


@settings(max_examples=30, deadline=None)
@given(
    topology=topologies(),
    block=st.integers(1, 6),
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_every_topology_quantises_to_the_bytes_of_whole_matrices(
    topology, block, rule, dtype, seed
):
    model, quantisation = topology.model, Quantisation.of(topology.model, block, rule)
    layout = topology.source
    served = quantised_layout(layout, quantisation, may_straddle=True)
    weights = random_weights(model, seed, dtype)
    written = quantised_by_ranks(layout, served, quantisation, filled(layout, weights, dtype))
    expected = filled(served, whole_matrices(weights, quantisation), torch.bfloat16)
    assert num_different_bytes(written, expected) == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_without_the_exchange_straddling_blocks_and_only_they_differ(tp_size, rule):
    model = tiny_model(hidden_size=9, intermediate_size=24)
    quantisation = Quantisation.of(model, 4, rule)
    layout = trainer_layout(model, ParallelConfig(tp_size=tp_size))
    served = quantised_layout(layout, quantisation, may_straddle=True)
    weights = random_weights(model, 1, torch.float32)
    written = quantised_by_ranks(
        layout, served, quantisation, filled(layout, weights, torch.float32), exchange=False
    )
    expected = filled(served, whole_matrices(weights, quantisation), torch.bfloat16)
    does_straddle = bool(straddling_blocks(layout, quantisation))
    assert does_straddle == (tp_size == 4)  # 24 inner rows in parts of 6, blocks of 4
    assert (num_different_bytes(written, expected) > 0) == does_straddle


def test_an_engine_receives_whole_blocks_from_a_trainer_that_cuts_them():
    model = tiny_model(hidden_size=8, intermediate_size=24)
    quantisation = Quantisation.of(model, 4)
    layout = trainer_layout(model, ParallelConfig(tp_size=4, pp_size=2, dp_size=2))
    source = quantised_layout(layout, quantisation, may_straddle=True)
    weights = random_weights(model, 2, torch.bfloat16)
    served = quantised_by_ranks(
        layout, source, quantisation, filled(layout, weights, torch.bfloat16)
    )
    for target in (engine_layout(model, 2), canonical_layout(model)):
        target = quantised_layout(target, quantisation)
        into = [empty_storages(rank, torch.bfloat16) for rank in target.ranks]
        execute(plan_transfer(source, target), by_rank(served), by_rank(into))
        expected = filled(target, whole_matrices(weights, quantisation), torch.bfloat16)
        assert num_different_bytes(into, expected) == 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_all_ranks_and_named_by_their_holder(wrong):
    model, rank = tiny_model(), 1
    quantisation = Quantisation.of(model, 4)
    layout = trainer_layout(model, ParallelConfig(tp_size=2))
    served = quantised_layout(layout, quantisation, may_straddle=True)
    storages = filled(layout, random_weights(model, 3, torch.float32), torch.float32)
    storages[rank]["decoder.layers.2.mlp.linear_fc2.weight"][3, 1] = wrong
    quantisers = [SourceQuantiser(layout, served, quantisation, rank) for rank in range(2)]
    maxima = [q.measure(held) for q, held in zip(quantisers, storages, strict=True)]
    highest = torch.maximum(maxima[0].shared, maxima[1].shared)
    for number, message in ((1, r"model\.layers\.2\.mlp\.down_proj\.weight;"), (0, "another")):
        into = empty_storages(served.ranks[number], torch.bfloat16)

        def all_max(vector):
            vector.copy_(highest)

        with pytest.raises(DivergenceError, match=message):
            quantisers[number].quantise(storages[number], into, all_max)
        assert not any(tensor.view(torch.uint8).any() for tensor in into.values())


def test_ranks_of_an_empty_stage_take_part_in_the_exchange():
    model = tiny_model(num_hidden_layers=1, intermediate_size=24)
    quantisation = Quantisation.of(model, 4)
    layout = trainer_layout(model, ParallelConfig(tp_size=4, pp_size=3, pipeline_layout="Et||L"))
    served = quantised_layout(layout, quantisation, may_straddle=True)
    weights = random_weights(model, 4, torch.bfloat16)
    held = filled(layout, weights, torch.bfloat16)
    assert held[4:8] == [{}] * 4
    written = quantised_by_ranks(layout, served, quantisation, held)
    expected = filled(served, whole_matrices(weights, quantisation), torch.bfloat16)
    assert num_different_bytes(written, expected) == 0


def test_storages_of_another_layout_are_refused():
    model = tiny_model()
    quantisation = Quantisation.of(model, 4)
    layout = canonical_layout(model)
    served = quantised_layout(layout, quantisation)
    quantiser = SourceQuantiser(layout, served, quantisation, 0)
    held = empty_storages(layout.ranks[0], torch.bfloat16)
    with pytest.raises(LayoutError, match=r"weight_scale_inv .* is missing"):
        quantiser.quantise(held, held, lambda vector: None)
