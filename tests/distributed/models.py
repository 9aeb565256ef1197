"""Models that ranks train in these tests, and their starting weights."""

from __future__ import annotations

from pathlib import Path

from npr_megatron.config.model import InitConfig, ModelConfig, MoeConfig, RopeScaling
from npr_megatron.weights.checkpoints.hf import random_init, write_hf
from tests.distributed.jobs import MODEL

UNTIED = MODEL.model_copy(update={"tie_word_embeddings": False})
MOE = UNTIED.model_copy(
    update={
        "family": "qwen3_moe",
        "moe": MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    }
)
LLAMA = UNTIED.model_copy(
    update={
        "family": "llama",
        "has_qk_norm": False,
        # In the reach of the samples, so that a lost stretch shows.
        "rope_scaling": RopeScaling(
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    }
)


def with_dense_layers(model: ModelConfig, num_dense_layers: int) -> ModelConfig:
    """Return ``model`` with an MLP in its first layers."""
    assert model.moe is not None
    moe = model.moe.model_copy(update={"num_dense_layers": num_dense_layers})
    return model.model_copy(update={"moe": moe})


def write_model(folder: Path, model: ModelConfig) -> Path:
    """Write a random model whose norms are not all ones, so that a lost norm shows."""
    tensors = random_init(model, InitConfig(embedding_std=0.3), seed=3)
    for number, (name, tensor) in enumerate(tensors.items()):
        if "norm" in name:
            tensor.add_((tensor.cumsum(0) * (number + 1)).sin() * 0.2)
    write_hf(folder, model, tensors)
    return folder
