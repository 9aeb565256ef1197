"""Which models can be trained, and what no model of a family has."""

from __future__ import annotations

import pytest

from npr_megatron.config.families import TRAINABLE_FAMILIES, family_problems, model_problems
from npr_megatron.config.model import ModelConfig, MoeConfig

EXPERTS = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
GLM_EXPERTS = EXPERTS.model_copy(
    update={"shared_intermediate_size": 8, "has_expert_bias": True, "num_dense_layers": 1}
)
SOUND = {
    "qwen3": {},
    "qwen3_moe": {"moe": EXPERTS},
    "llama": {"has_qk_norm": False},
    "glm4_moe": {"moe": GLM_EXPERTS},
}


def model_of(family: str, **changes) -> ModelConfig:
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 8,
        "vocab_size": 8,
    }
    return ModelConfig.model_validate({**sizes, "family": family, **SOUND[family], **changes})


@pytest.mark.parametrize("family", SOUND)
def test_a_sound_model_of_each_family(family):
    model = model_of(family)
    assert family_problems(model) == []
    assert (not [*model_problems(model)]) == (family in TRAINABLE_FAMILIES)


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        ("glm4_moe", {}, "family is glm4_moe and training computes qwen3, qwen3_moe, llama only"),
        ("llama", {"moe": EXPERTS}, "family llama is dense and moe is set"),
        ("qwen3_moe", {"moe": None}, "family qwen3_moe has routed experts and moe is not set"),
        (
            "qwen3_moe",
            {"moe": EXPERTS.model_copy(update={"num_experts_per_tok": 5})},
            "has 4 experts and num_experts_per_tok is 5",
        ),
        (
            "qwen3_moe",
            {"moe": EXPERTS.model_copy(update={"num_experts_per_tok": 1})},
            "num_experts_per_tok is 1 and its weights are normalised to one",
        ),
        ("qwen3", {"head_dim": 7}, "head_dim 7 is odd"),
    ],
)
def test_what_cannot_be_trained_is_named_alone(family, changes, sentence):
    (problem,) = model_problems(model_of(family, **changes))
    assert sentence in problem
