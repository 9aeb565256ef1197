"""config.json of every family: read back equal, and transformers builds the same parameters."""

from __future__ import annotations

import json

import pytest
import torch

from npr_megatron.config.hf_architecture import read_architecture
from npr_megatron.config.model import ModelConfig, MoeConfig, RopeScaling
from npr_megatron.errors import LayoutError
from npr_megatron.weights.checkpoints.hf_config import hf_config
from npr_megatron.weights.names import canonical_parameters

EXPERTS = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6)
SHARED = {"shared_intermediate_size": 12, "has_expert_bias": True, "num_dense_layers": 1}
FAMILIES = {
    "qwen3": {},
    "qwen3 untied": {"tie_word_embeddings": False, "rope_theta": 5e5},
    "llama": {"family": "llama", "has_qk_norm": False, "head_dim": 16},
    "llama 3": {
        "family": "llama",
        "has_qk_norm": False,
        "rope_scaling": RopeScaling(
            factor=8,
            low_freq_factor=1,
            high_freq_factor=4,
            original_max_position_embeddings=64,
        ),
    },
    "qwen3_moe": {"family": "qwen3_moe", "moe": EXPERTS},
    "qwen3_moe dense first": {
        "family": "qwen3_moe",
        "moe": EXPERTS.model_copy(update={"num_dense_layers": 2}),
    },
    "glm4_moe": {
        "family": "glm4_moe",
        "moe": EXPERTS.model_copy(update=SHARED),
        "tie_word_embeddings": False,
    },
    "glm4_moe without head norms": {
        "family": "glm4_moe",
        "has_qk_norm": False,
        "moe": EXPERTS.model_copy(update=SHARED),
        "tie_word_embeddings": False,
    },
}


def model_of(**changes) -> ModelConfig:
    sizes = {
        "num_hidden_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 10,
        "vocab_size": 20,
    }
    return ModelConfig.model_validate({**sizes, **changes})


@pytest.mark.parametrize("name", FAMILIES)
def test_config_comes_back_as_the_same_architecture(tmp_path, name):
    model = model_of(**FAMILIES[name])
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model)))
    assert read_architecture(tmp_path) == model


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_saves_exactly_the_parameters_that_are_named(tmp_path, name):
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    model = model_of(**FAMILIES[name])
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model)))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    theirs.to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert found == {p.name: p.shape for p in canonical_parameters(model)}
    assert read_architecture(tmp_path / "saved") == model


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"family": "qwen3_moe"}, "family qwen3_moe has routed experts and moe is not set"),
        ({"moe": EXPERTS}, "family qwen3 is dense and moe is set"),
        ({"has_qk_norm": False}, "family qwen3 normalises queries and keys"),
        ({"family": "llama"}, "family llama has no query and key norms"),
        (
            {"family": "qwen3_moe", "moe": EXPERTS.model_copy(update=SHARED)},
            "family qwen3_moe has neither shared experts nor an expert bias",
        ),
        ({"family": "glm4_moe", "moe": EXPERTS}, "shared_intermediate_size 0 is no positive"),
        ({"family": "glm4_moe", "moe": EXPERTS}, "family glm4_moe has an expert bias"),
    ],
)
def test_what_a_family_has_no_word_for_is_refused(changes, sentence):
    with pytest.raises(LayoutError, match=sentence):
        hf_config(model_of(**changes))
