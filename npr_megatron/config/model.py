"""Architecture of a Qwen3-like decoder, in the words of its HF ``config.json``."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from npr_megatron.config.base import Section


class ModelConfig(Section):
    """Dense Qwen3: RMSNorm, grouped-query attention with q/k norms, SwiGLU, rotary positions."""

    num_hidden_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    """Embedding rows, spare ones included."""
    rope_theta: PositiveFloat = 10_000.0
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = True
    max_position_embeddings: PositiveInt = 4096


class InitConfig(Section):
    """Random initialisation of a new model (normal distributions, keyed by parameter name and run
    seed)."""

    embedding_std: float = Field(default=0.02, gt=0)
    matrix_gain: float = Field(default=1.0, gt=0)
    """Matrices are drawn with std = gain / sqrt(fan_in); projections into the residual stream are
    scaled further by 1 / sqrt(2 * layers)."""
