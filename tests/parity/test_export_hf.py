"""transformers loads what we write: the same tensors, and the logits that follow from them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from npr_megatron.config.hf_architecture import read_architecture
from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.weights.checkpoints.hf import read_hf, write_hf
from npr_megatron.weights.layouts import canonical_layout
from npr_megatron.weights.names import canonical_parameters
from npr_megatron.weights.storages import empty_storages, load_tiles

SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}
EXPERTS = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
GLM_EXPERTS = EXPERTS.model_copy(
    update={"num_dense_layers": 1, "shared_intermediate_size": 16, "has_expert_bias": True}
)
MODELS = {
    "qwen3": ModelConfig(**SIZES),
    "qwen3 tied": ModelConfig(**SIZES | {"tie_word_embeddings": True}),
    "llama": ModelConfig(**SIZES, family="llama", has_qk_norm=False),
    "qwen3_moe": ModelConfig(**SIZES, family="qwen3_moe", moe=EXPERTS),
    "qwen3_moe, dense first": ModelConfig(
        **SIZES, family="qwen3_moe", moe=EXPERTS.model_copy(update={"num_dense_layers": 1})
    ),
    "glm4_moe": ModelConfig(**SIZES, family="glm4_moe", has_qk_norm=False, moe=GLM_EXPERTS),
    "glm4_moe, q/k norms": ModelConfig(**SIZES, family="glm4_moe", moe=GLM_EXPERTS),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_tensors(model: ModelConfig, dtype: torch.dtype = torch.float32):
    """Return canonical tensors in which nothing is constant, so that whatever is lost shows."""
    torch.manual_seed(17)
    tensors = {}
    for parameter in canonical_parameters(model):
        values = torch.randn(parameter.shape)
        values = values * 0.3 if len(parameter.shape) > 1 else 1 + 0.3 * values
        tensors[parameter.name] = values if parameter.dtype == "fp32" else values.to(dtype)
    return tensors


def same(found, expected) -> bool:
    return found.dtype == expected.dtype and torch.equal(found, expected)


def in_memory(model: ModelConfig, tensors) -> dict[str, torch.Tensor]:
    """Return the state of transformers' module: it stacks the experts of a layer."""
    state = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    if model.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for layer in range(model.moe.num_dense_layers if model.moe else 3, 3):
        experts = f"model.layers.{layer}.mlp.experts"
        each = [
            [tensors[f"{experts}.{n}.{side}_proj.weight"] for side in ("gate", "up", "down")]
            for n in range(model.moe.num_experts)
        ]
        state[f"{experts}.gate_up_proj"] = torch.stack([torch.cat(e[:2]) for e in each])
        state[f"{experts}.down_proj"] = torch.stack([e[2] for e in each])
    return state


@torch.no_grad()
def logits(hf) -> torch.Tensor:
    tokens = torch.arange(40).view(2, 20) * 7 % 64
    return hf.eval()(input_ids=tokens).logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_transformers_holds_and_computes_with_the_tensors_written(name, dtype, tmp_path):
    model = MODELS[name]
    tensors = random_tensors(model, DTYPES[dtype])
    write_hf(tmp_path / "ours", model, tensors)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs")

    written = load_file(tmp_path / "theirs" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert [key for key, tensor in tensors.items() if not same(written[key], tensor)] == []

    config = AutoConfig.from_pretrained(tmp_path / "ours")
    direct = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    direct.load_state_dict(in_memory(model, tensors), strict=True)
    torch.testing.assert_close(logits(loaded), logits(direct), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_writes_is_read_as_the_same_model(name, tmp_path):
    model = MODELS[name]
    tensors = random_tensors(model)
    write_hf(tmp_path / "ours", model, tensors)
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert read_architecture(tmp_path / "theirs") == model
    layout = canonical_layout(model).ranks[0]
    again = empty_storages(layout, torch.float32)
    load_tiles(layout, read_hf(tmp_path / "theirs", model).read, again)
    assert [key for key, tensor in tensors.items() if not same(again[key], tensor)] == []


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("qwen3", "gate_proj", "up_proj"),
        ("qwen3 tied", "layers.0.", "layers.1."),
        ("llama", "input_layernorm", "post_attention_layernorm"),
        ("qwen3_moe", "experts.0.", "experts.1."),
        ("glm4_moe", "shared_experts.gate_proj", "shared_experts.up_proj"),
        ("glm4_moe, q/k norms", "q_norm", "k_norm"),
    ],
)
def test_logits_tell_exchanged_tensors(name, one, other, tmp_path):
    model = MODELS[name]
    tensors = random_tensors(model)
    exchanged = {
        key.replace(one, "*").replace(other, one).replace("*", other): tensor
        for key, tensor in tensors.items()
    }
    found = []
    for folder, content in (("right", tensors), ("wrong", exchanged)):
        write_hf(tmp_path / folder, model, content)
        found.append(logits(AutoModelForCausalLM.from_pretrained(tmp_path / folder)))
    assert (found[0] - found[1]).abs().max() > 1e-2
