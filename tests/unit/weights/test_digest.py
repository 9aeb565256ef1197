"""The digest is one number for all layouts, and every planted fault changes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from npr_megatron.config.model import InitConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.box import Box
from npr_megatron.weights.digest import Census, digest_box, digests
from npr_megatron.weights.hf import random_init
from npr_megatron.weights.layout import canonical_layout, engine_layout, trainer_layout
from npr_megatron.weights.tiles import Layout
from tests.unit.weights.oracles import (
    Tensors,
    Topology,
    element_ids,
    engine_storages,
    tiny_model,
    topologies,
    trainer_storages,
)

MODEL = tiny_model()


def digests_of(layout: Layout, storages: list[Tensors]) -> set[int]:
    census = Census(layout)
    return digests(census.shares(rank, tensors) for rank, tensors in enumerate(storages))


def digest_of(weights: Tensors) -> int:
    (digest,) = digests_of(canonical_layout(MODEL), [weights])
    return digest


def slow_digest(parameter: str, values: torch.Tensor) -> int:
    """Sum key * bits element by element; a matrix with a single 1 reveals the key of its place."""
    whole = 0
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            one = torch.zeros_like(values)
            one[row, column] = 1
            key = digest_box(parameter, Box((0, 0), tuple(values.shape)), one)
            assert key % 2 == 1
            whole += key * (int(values[row, column]) % 2**64)
    return whole % 2**64


def test_digest_of_a_box_is_the_sum_of_key_times_bits():
    values = torch.tensor([[1, -2, 3], [2**62, 5, -6]])
    box = Box((0, 0), (2, 3))
    assert digest_box("p", box, values) == slow_digest("p", values)
    assert digest_box("q", box, values) != slow_digest("p", values)


def test_boxes_of_a_parameter_add_up_to_it():
    values = torch.randn(300, 700)
    whole = digest_box("p", Box((0, 0), (300, 700)), values)
    parts = [Box((0, 0), (123, 700)), Box((123, 0), (300, 50)), Box((123, 50), (300, 700))]
    assert sum(digest_box("p", box, values[box.slices]) for box in parts) % 2**64 == whole


@settings(max_examples=15, deadline=None)
@given(topologies())
def test_trainer_engine_and_hf_have_one_digest(topology: Topology):
    model, parallel, engine_tp = topology.model, topology.parallel, topology.engine_tp_size
    ids = element_ids(model)
    expected = digests_of(canonical_layout(model), [ids])
    assert len(expected) == 1
    trainer = trainer_storages(model, parallel, ids)
    assert digests_of(trainer_layout(model, parallel), trainer) == expected
    engine = engine_storages(model, engine_tp, ids)
    assert digests_of(engine_layout(model, engine_tp), engine) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_digest_sees_every_planted_fault(dtype):
    weights = {n: t.to(dtype) for n, t in random_init(MODEL, InitConfig(), seed=1).items()}
    faults = {
        "swapped query heads": _swap_rows("model.layers.0.self_attn.q_proj.weight", 0, 4, 4),
        "swapped kv heads": _swap_rows("model.layers.1.self_attn.k_proj.weight", 0, 4, 4),
        "swapped rows": _swap_rows("model.layers.1.mlp.up_proj.weight", 2, 3, 1),
        "k against v": _exchange("layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj"),
        "gate against up": _exchange("layers.2.mlp.gate_proj", "layers.2.mlp.up_proj"),
        "layer against layer": _exchange("layers.0.mlp.down_proj", "layers.3.mlp.down_proj"),
        "rolled rows": lambda w: _roll(w["model.embed_tokens.weight"], 0),
        "rolled columns": lambda w: _roll(w["model.layers.3.self_attn.o_proj.weight"], 1),
        "reversed": lambda w: w["model.norm.weight"].copy_(torch.arange(6)),
    }
    digest = digest_of(weights)
    for fault, plant in faults.items():
        wrong = {name: tensor.clone() for name, tensor in weights.items()}
        plant(wrong)
        assert digest_of(wrong) != digest, fault


def _swap_rows(name: str, first: int, second: int, count: int):
    def plant(weights: Tensors) -> None:
        one, other = weights[name][first : first + count], weights[name][second : second + count]
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)

    return plant


def _exchange(one: str, other: str):
    def plant(weights: Tensors) -> None:
        first, second = f"model.{one}.weight", f"model.{other}.weight"
        weights[first], weights[second] = weights[second], weights[first]

    return plant


def _roll(tensor: torch.Tensor, axis: int) -> None:
    tensor.copy_(tensor.roll(1, axis))


@pytest.mark.parametrize("bit", range(16))
def test_digest_sees_any_single_flipped_bit_of_any_bf16_element(bit):
    values = torch.randn(5, 7).to(torch.bfloat16)
    box = Box((0, 0), (5, 7))
    digest = digest_box("p", box, values)
    for element in range(values.numel()):
        flipped = values.clone()
        flipped.view(torch.int16).view(-1)[element] ^= -(2**15) if bit == 15 else 1 << bit
        assert digest_box("p", box, flipped) != digest


def test_two_flipped_signs_do_not_cancel():
    values = torch.randn(4, 8)
    box = Box((0, 0), (4, 8))
    digest = digest_box("p", box, values)
    for first in range(32):
        for second in range(first):
            flipped = values.clone()
            flipped.view(-1)[[first, second]] *= -1
            assert digest_box("p", box, flipped) != digest


@pytest.mark.parametrize(
    ("rank", "storage"),
    [
        (1, "decoder.layers.0.input_layernorm.weight"),  # a replica on a tensor-parallel rank
        (2, "decoder.layers.1.mlp.linear_fc2.weight"),  # on a data-parallel rank
        (7, "output_layer.weight"),  # the tied head of the last stage
    ],
)
def test_a_replica_that_differs_gives_a_second_digest(rank, storage):
    parallel = ParallelConfig(tp_size=2, pp_size=2, dp_size=2)
    weights = random_init(MODEL, InitConfig(), seed=1)
    storages = trainer_storages(MODEL, parallel, weights)
    layout = trainer_layout(MODEL, parallel)
    assert digests_of(layout, storages) == {digest_of(weights)}
    wrong = storages[rank][storage].clone()
    wrong.view(-1)[0] += 1.0
    storages[rank] = {**storages[rank], storage: wrong}
    assert len(digests_of(layout, storages)) > 1
