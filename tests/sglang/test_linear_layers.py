"""SGLang's own loaders cut our export as our layout of it says.

Only the linear layers: all they ask is the process group that cuts them, whose answers are given
here. Embeddings and experts ask SGLang's process-wide state, which needs a running server.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from npr_megatron.weights.checkpoints.hf import write_hf
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles
from tests.absence import absence_of_sglang
from tests.parity.test_export_hf import MODELS, random_tensors

linear = pytest.importorskip("sglang.srt.layers.linear", reason=absence_of_sglang())
pytestmark = pytest.mark.filterwarnings("ignore:Only CUDA, .* support:UserWarning")


@dataclass(frozen=True)
class Place:
    """What SGLang's loaders ask a process group for."""

    rank_in_group: int
    world_size: int


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_linear_layers_of_sglang_hold_what_the_layout_declares(tp_size, tmp_path, monkeypatch):
    model = MODELS["qwen3"]
    tensors = random_tensors(model)
    write_hf(tmp_path / "model", model, tensors)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for rank, declared in enumerate(engine_layout(model, tp_size, engine="sglang").ranks):
        expected = empty_storages(declared, torch.float32)
        load_tiles(declared, box_reader(tensors), expected)
        place = Place(rank, tp_size)
        monkeypatch.setattr(linear, "_resolve_linear_group", lambda _, place=place: place)
        for layer in range(model.num_hidden_layers):
            for name, weight in loaded_by_sglang(stored, layer).items():
                assert torch.equal(weight, expected[f"{name}.weight"]), (rank, name)


def loaded_by_sglang(stored, layer: int) -> dict[str, torch.Tensor]:
    """Return the weights of a layer's modules after every part went through its weight_loader."""
    model = MODELS["qwen3"]
    hidden, inner, heads = model.hidden_size, model.intermediate_size, model.num_attention_heads
    plain = {"bias": False, "params_dtype": torch.float32}
    here = f"model.layers.{layer}"
    qkv = linear.QKVParallelLinear(
        hidden, model.head_dim, heads, model.num_key_value_heads, **plain
    )
    for side in "qkv":
        part = stored[f"{here}.self_attn.{side}_proj.weight"]
        qkv.weight.weight_loader(qkv.weight, part, side)
    gate_up = linear.MergedColumnParallelLinear(hidden, [inner, inner], **plain)
    for number, side in enumerate(("gate", "up")):
        part = stored[f"{here}.mlp.{side}_proj.weight"]
        gate_up.weight.weight_loader(gate_up.weight, part, number)
    modules = {f"{here}.self_attn.qkv_proj": qkv, f"{here}.mlp.gate_up_proj": gate_up}
    for name, width in (("self_attn.o_proj", heads * model.head_dim), ("mlp.down_proj", inner)):
        modules[f"{here}.{name}"] = row = linear.RowParallelLinear(width, hidden, **plain)
        row.weight.weight_loader(row.weight, stored[f"{here}.{name}.weight"])
    return {name: module.weight.data for name, module in modules.items()}
