"""What is planted wrong in live modules, or in a layout of them, is found and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from npr_megatron.errors import LayoutError
from npr_megatron.weights.layouts import trainer_layout
from npr_megatron.weights.tiles import RankLayout
from tests.distributed.harness import run_ranks
from tests.distributed.live_models import Case
from tests.distributed.test_live_layouts import GLM4_MOE, UNTIED, World, case, fill

MOE = case("moe", GLM4_MOE)
CUT = case("cut", UNTIED, tp_size=2)
INTERLEAVED = case("interleaved", UNTIED, pp_size=2, vpp_size=2)


def renamed(layout: RankLayout, one: str, other: str) -> RankLayout:
    """Swap two parts of parameter names in all tiles."""

    def swap(name: str) -> str:
        return name.replace(one, "*").replace(other, one).replace("*", other)

    tiles = [dataclasses.replace(tile, parameter=swap(tile.parameter)) for tile in layout.tiles]
    return RankLayout(layout.storages, tuple(tiles))


WRONG_LAYOUTS = {
    "two layers swapped": ("layers.1.", "layers.2."),
    "two experts swapped": ("experts.0.", "experts.3."),
    "gate and up swapped": ("gate_proj", "up_proj"),
    "keys and values swapped": ("k_proj", "v_proj"),
    "the norms of a layer swapped": ("input_layernorm", "post_attention_layernorm"),
    "the q/k norms swapped": ("q_norm", "k_norm"),
}


def fill_wrongly(rank, world_size, init_method):
    """Return by planted fault whether Megatron disagrees."""
    from npr_megatron.model.live_layout import live_layout
    from npr_megatron.runtime.device import device_scope

    with device_scope():
        chunks = World(rank, world_size, init_method).chunks(MOE)
        layout = live_layout(chunks, MOE.model)
        found = {"nothing": fill(chunks, layout, MOE)}
        for fault, names in WRONG_LAYOUTS.items():
            found[fault] = fill(chunks, renamed(layout, *names), MOE)
    return found


def test_megatron_disagrees_with_every_wrong_layout(tmp_path):
    (found,) = run_ranks(fill_wrongly, 1, tmp_path)
    assert found.pop("nothing") == []
    assert found.keys() == WRONG_LAYOUTS.keys()
    assert all(found.values()), found


def swap_layer_numbers(chunks: list[Any]) -> None:
    first, second = chunks[0].decoder.layers[0], chunks[0].decoder.layers[1]
    first.layer_number, second.layer_number = second.layer_number, first.layer_number


def shift_layer_numbers(chunks: list[Any]) -> None:
    for layer in chunks[0].decoder.layers:
        layer.layer_number += 1


def rotate_experts(chunks: list[Any]) -> None:
    indices = chunks[0].decoder.layers[1].mlp.local_expert_indices
    indices.append(indices.pop(0))


def add_parameter(chunks: list[Any]) -> None:
    chunks[0].decoder.layers[0].mlp.extra = torch.nn.Parameter(torch.zeros(3))


def add_buffer(chunks: list[Any]) -> None:
    chunks[0].decoder.layers[0].mlp.register_buffer("extra", torch.zeros(3))


def add_scratch(chunks: list[Any]) -> None:
    chunks[0].decoder.layers[0].mlp.register_buffer("scratch", torch.zeros(3), persistent=False)


def bias_in_bf16(chunks: list[Any]) -> None:
    chunks[0].to(torch.bfloat16)


def one_matrix_in_bf16(chunks: list[Any]) -> None:
    chunks[0].decoder.layers[2].self_attention.linear_proj.to(torch.bfloat16)


def strange_module(chunks: list[Any]) -> None:
    class Unheard(torch.nn.Module):
        pass

    attention = chunks[0].decoder.layers[0].self_attention
    strange = Unheard()
    strange.weight = attention.linear_proj.weight
    attention.linear_proj = strange


def zero_centred_norms(chunks: list[Any]) -> None:
    chunks[0].config.layernorm_zero_centered_gamma = True


def marks_rubbed_out(chunks: list[Any]) -> None:
    for parameter in chunks[0].parameters():
        parameter.tensor_model_parallel = False
        parameter.partition_dim = -1


def other_groups(chunks: list[Any]) -> None:
    from megatron.core import parallel_state

    layer = chunks[0].decoder.layers[0]
    alone = parallel_state.get_data_parallel_group()
    layer.self_attention.linear_qkv.tp_group = layer.mlp.linear_fc2.tp_group = alone


def swap_chunks(chunks: list[Any]) -> None:
    chunks.reverse()


Fault = Callable[[list[Any]], None]
MISBUILT: list[tuple[Case, Fault, list[str]]] = [
    (MOE, swap_layer_numbers, ["decoder.layers.1 runs after layer number 2 but has number 1"]),
    (MOE, shift_layer_numbers, ["storage decoder.layers.4.", "storage decoder.layers.0."]),
    (MOE, rotate_experts, ["local_experts.3.linear_fc1", "mlp.experts.0.gate_proj.weight"]),
    (MOE, add_parameter, ["decoder.layers.0.mlp.extra [3]: is no weight"]),
    (MOE, add_buffer, ["decoder.layers.0.mlp.extra [3]: is no weight"]),
    (
        MOE,
        bias_in_bf16,
        ["mlp.router.expert_bias [4]: is torch.bfloat16, expected torch.float32"],
    ),
    (
        MOE,
        one_matrix_in_bf16,
        ["decoder.layers.2.self_attention.linear_proj.weight [32, 64]: is torch.bfloat16"],
    ),
    (MOE, strange_module, ["linear_proj.weight [32, 64]: belongs to a Unheard"]),
    (MOE, zero_centred_norms, ["layernorm_zero_centered_gamma is True"]),
    (MOE, add_scratch, []),
    (MOE, marks_rubbed_out, []),
    (CUT, marks_rubbed_out, []),
    (INTERLEAVED, swap_chunks, ["decoder.layers.0 runs after layer number"]),
    (CUT, other_groups, ["linear_qkv.weight [64, 32]: 1 such shards do not make the 128 rows"]),
]


def misbuild(rank, world_size, init_method, faults: list[tuple[Case, Fault, list[str]]]):
    """Return the complaint about every planted fault, None where there is none."""
    from npr_megatron.model.live_layout import check_live_layout, live_layout
    from npr_megatron.runtime.device import device_scope

    complaints: list[str | None] = []
    for number, (where, plant, _) in enumerate(faults):
        with device_scope():
            chunks = World(rank, world_size, f"{init_method}-{number}").chunks(where)
            plant(chunks)
            declared = trainer_layout(where.model, where.parallel).ranks[rank]
            try:
                check_live_layout(live_layout(chunks, where.model), declared)
                complaints.append(None)
            except LayoutError as error:
                complaints.append(str(error))
    return complaints


@pytest.mark.parametrize("where", [MOE, CUT, INTERLEAVED], ids=lambda where: where.name)
def test_modules_that_are_not_what_was_declared_are_named(where, tmp_path):
    faults = [fault for fault in MISBUILT if fault[0] is where]
    for complaints in run_ranks(misbuild, where.parallel.world_size, tmp_path, faults):
        for (_, plant, expected), complaint in zip(faults, complaints, strict=True):
            assert (complaint is not None) == bool(expected), (plant, complaint)
            assert all(part in str(complaint) for part in expected), (plant, complaint)


def spell_as_transformer_engine(chunk: Any) -> None:
    """Put the same tensors into modules named, and holding them, as TransformerEngine's do."""
    fused = type("TELayerNormColumnParallelLinear", (torch.nn.Module,), {})
    grouped = {
        "linear_fc1": type("TEColumnParallelGroupedLinear", (torch.nn.Module,), {}),
        "linear_fc2": type("TERowParallelGroupedLinear", (torch.nn.Module,), {}),
    }
    for layer in chunk.decoder.layers:
        fusions = [(layer.self_attention, "linear_qkv", "input_layernorm")]
        if hasattr(layer.mlp, "experts"):
            experts = layer.mlp.experts.local_experts
            layer.mlp.experts = torch.nn.Module()
            for name, kind in grouped.items():
                linear = kind()
                linear._tp_group, linear.tp_group = getattr(experts[0], name).tp_group, None
                for number, expert in enumerate(experts):
                    setattr(linear, f"weight{number}", getattr(expert, name).weight)
                setattr(layer.mlp.experts, name, linear)
        else:
            fusions.append((layer.mlp, "linear_fc1", "pre_mlp_layernorm"))
        for parent, name, norm in fusions:
            linear = fused()
            linear._tp_group, linear.tp_group = getattr(parent, name).tp_group, None
            linear.weight = getattr(parent, name).weight
            linear.layer_norm_weight = getattr(layer, norm).weight
            setattr(parent, name, linear)
            setattr(layer, norm, torch.nn.Identity())


def respell(rank, world_size, init_method, where: Case):
    """Return both layouts, and whether both name the same tensors, before and after respelling."""
    from npr_megatron.model.live_layout import live_layout
    from npr_megatron.model.storages import stage_storages
    from npr_megatron.runtime.device import device_scope

    with device_scope():
        chunks = World(rank, world_size, init_method).chunks(where)
        local, tensors = live_layout(chunks, where.model), stage_storages(chunks)
        for chunk in chunks:
            spell_as_transformer_engine(chunk)
        spelled, again = live_layout(chunks, where.model), stage_storages(chunks)
        local_names = [name for name, _ in chunks[0].named_parameters()]
    same = all(tensors[name].data_ptr() == again[name].data_ptr() for name in tensors)
    return (
        set(local.storages),
        set(local.tiles),
        set(spelled.storages),
        set(spelled.tiles),
        same,
        local_names,
    )


def test_spellings_of_transformer_engine_are_the_same_weights(tmp_path):
    where = case("te", GLM4_MOE, tp_size=2, ep_size=2, etp_size=1)
    for storages, tiles, te_storages, te_tiles, same, names in run_ranks(
        respell, 2, tmp_path, where
    ):
        assert "decoder.layers.1.mlp.experts.linear_fc1.weight1" in names
        assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in names
        assert (te_storages, te_tiles) == (storages, tiles)
        assert same
