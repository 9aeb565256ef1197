"""Rotary frequencies are those of transformers, stretched for Llama 3 or not."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from npr_megatron.config.model import ModelConfig, RopeScaling
from npr_megatron.topology.rotary import inverse_frequencies

LLAMA_31 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
NEAR = RopeScaling(
    factor=3.0, low_freq_factor=0.5, high_freq_factor=2.5, original_max_position_embeddings=64
)


def model_of(head_dim: int, rope_theta: float, scaling: RopeScaling | None) -> ModelConfig:
    return ModelConfig(
        family="llama",
        num_hidden_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=head_dim,
        intermediate_size=8,
        vocab_size=8,
        rope_theta=rope_theta,
        rope_scaling=scaling,
        max_position_embeddings=131_072,
    )


def of_transformers(model: ModelConfig) -> np.ndarray:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        rope |= {"rope_type": "llama3", **model.rope_scaling.model_dump()}
    config = LlamaConfig(
        head_dim=model.head_dim,
        hidden_size=model.hidden_size,
        num_attention_heads=1,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters=rope,
    )
    return LlamaRotaryEmbedding(config).inv_freq.numpy()


@pytest.mark.parametrize("scaling", [None, LLAMA_31, NEAR])
@pytest.mark.parametrize(("head_dim", "rope_theta"), [(128, 5e5), (64, 1e4), (6, 1e6)])
def test_frequencies_are_those_of_transformers(head_dim, rope_theta, scaling):
    model = model_of(head_dim, rope_theta, scaling)
    found, expected = inverse_frequencies(model), of_transformers(model)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_slow_planes_turn_slower_fast_ones_do_not_and_some_are_between():
    plain = inverse_frequencies(model_of(128, 5e5, None))
    ratio = plain / inverse_frequencies(model_of(128, 5e5, LLAMA_31))
    is_fast, is_slow = np.isclose(ratio, 1), np.isclose(ratio, 8)
    assert is_fast[0]
    assert is_slow[-1]
    assert 0 < (~is_fast & ~is_slow).sum() < 16
    assert (np.diff(ratio) > -1e-5).all()


def test_the_ends_of_the_stretch_are_in_order():
    with pytest.raises(ValidationError, match="high_freq_factor 1 must be above low_freq_factor 1"):
        RopeScaling(
            factor=8,
            low_freq_factor=1,
            high_freq_factor=1,
            original_max_position_embeddings=8,
        )
