"""The digest is one number for all layouts, and every planted fault changes it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from npr_megatron.config.model import InitConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.records.randomness import derive_seed
from npr_megatron.weights import digest as digest_module
from npr_megatron.weights.box import Box
from npr_megatron.weights.checkpoints.hf import random_init
from npr_megatron.weights.digest import Census, add_up_on_device, digest_box, digests
from npr_megatron.weights.layouts import canonical_layout, engine_layout, trainer_layout
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


def device_digest(parameter: str, box: Box, values: torch.Tensor) -> int:
    """What ``digest_box`` does for a tensor on a device, on the host."""
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    ends = [(0, 1), *zip(box.start, box.stop, strict=True)][-2:]
    keys = [
        torch.from_numpy(digest_module._keys(axis, *end).view(np.int64))
        for axis, end in zip(("row", "column"), ends, strict=True)
    ]
    total = add_up_on_device(torch.atleast_2d(values).view(word), *keys)
    return total * (derive_seed("digest", parameter) | 1) % 2**64


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64, torch.uint8]
)
@pytest.mark.parametrize("shape", [(7, 9), (5,), (1, 1), (300, 1)])
def test_device_arithmetic_gives_the_numbers_of_the_host(dtype, shape):
    bits = torch.randint(0, 256, (320, 96), dtype=torch.uint8)
    whole = bits.view(dtype)
    values = whole[: shape[0], : shape[1]] if len(shape) == 2 else whole[0, : shape[0]]
    box = Box.at((2, 3)[: len(shape)], shape)
    assert device_digest("p", box, values) == digest_box("p", box, values)


def test_device_arithmetic_in_several_pieces_is_the_same(monkeypatch):
    values, box = torch.randn(33, 20).to(torch.bfloat16), Box((4, 0), (37, 20))
    expected = digest_box("p", box, values)
    monkeypatch.setattr(digest_module, "_DEVICE_ELEMENTS", 64)
    assert device_digest("p", box, values) == expected


def test_one_byte_elements_are_summed_exactly():
    values = torch.tensor([[1, 2, 255], [128, 0, 7]], dtype=torch.uint8)
    box = Box((0, 0), (2, 3))
    assert digest_box("p", box, values) == slow_digest("p", values)
    assert digest_box("p", box, values.view(torch.float8_e4m3fn)) == slow_digest("p", values)


FAULTS_OF_A_KIND = 1700


def _faults(weights: Tensors, kind: str, rng: random.Random) -> tuple[Tensors, Tensors]:
    """Return parameters before and after a fault of ``kind`` at a random place."""
    layer, other = rng.sample(range(MODEL.num_hidden_layers), 2)
    name = rng.choice([n for n in weights if "proj" in n and f"layers.{layer}." in n])
    one = weights[name]
    if kind in ("k against v", "layer against layer"):
        if kind == "k against v":
            name = f"model.layers.{layer}.self_attn.k_proj.weight"
            second = name.replace("k_proj", "v_proj")
        else:
            second = name.replace(f"layers.{layer}.", f"layers.{other}.")
        before = {name: weights[name], second: weights[second]}
        return before, {name: weights[second], second: weights[name]}
    wrong = one.clone()
    if kind == "heads":
        size = MODEL.head_dim
        first, second = (
            rng.sample(range(one.shape[0] // size), 2) if one.shape[0] >= 2 * size else (0, 0)
        )
        if first == second:  # o_proj and down_proj have too few rows: swap columns
            wrong[:, [0, 1]] = one[:, [1, 0]]
        else:
            a, b = (slice(h * size, (h + 1) * size) for h in (first, second))
            wrong[a], wrong[b] = one[b], one[a]
    elif kind == "shifted rows":
        wrong = one.roll(rng.randrange(1, one.shape[0]), 0)
    elif kind == "reversal":
        axes = rng.choice([(0,), (1,), (0, 1)])
        wrong = one.flip(axes)
    else:
        word = wrong.view(torch.int16).view(-1)
        word[rng.randrange(word.numel())] ^= rng.choice(
            [1 << bit for bit in range(15)] + [-(2**15)]
        )
    return {name: one}, {name: wrong}


@pytest.mark.parametrize(
    "kind",
    ["heads", "k against v", "layer against layer", "shifted rows", "reversal", "one bit"],
)
def test_ten_thousand_faults_are_all_seen_and_a_plain_sum_misses_every_permutation(kind):
    """Sums are additive over parameters, so those that a fault touches decide."""
    rng = random.Random(kind)
    missed = missed_by_plain_sum = 0
    for number in range(FAULTS_OF_A_KIND):
        if number % 100 == 0:
            drawn = random_init(MODEL, InitConfig(), seed=number)
            weights = {n: t.to(torch.bfloat16) for n, t in drawn.items()}
        before, after = _faults(weights, kind, rng)
        assert any(not torch.equal(before[name], after[name]) for name in before)
        sums = [
            [sum(total(name, t) for name, t in state.items()) % 2**64 for state in (before, after)]
            for total in (_keyed_sum, _plain_sum)
        ]
        missed += sums[0][0] == sums[0][1]
        missed_by_plain_sum += sums[1][0] == sums[1][1]
    assert missed == 0
    assert missed_by_plain_sum == (0 if kind == "one bit" else FAULTS_OF_A_KIND)


def _keyed_sum(name: str, values: torch.Tensor) -> int:
    return digest_box(name, Box((0,) * values.dim(), tuple(values.shape)), values)


def _plain_sum(name: str, values: torch.Tensor) -> int:
    return int((values.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF).sum())
