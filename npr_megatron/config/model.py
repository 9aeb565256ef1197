"""Architecture of a decoder, in the words of its HF ``config.json``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from npr_megatron.config.base import Section


class MoeConfig(Section):
    """Routed experts, in place of the MLP of all layers but the first ``num_dense_layers``."""

    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    moe_intermediate_size: PositiveInt
    """Inner width of one expert."""
    num_dense_layers: NonNegativeInt = 0
    """Leading layers that keep a dense MLP of ``intermediate_size``."""
    shared_intermediate_size: NonNegativeInt = 0
    """Inner width of the shared experts taken together; 0 without any."""
    has_expert_bias: bool = False
    """The router has a correction bias per expert, fp32, not trained by gradients."""


class RopeScaling(Section):
    """Llama 3's way to longer texts: what turns too slowly to come round within the texts of the
    first training turns slower still (``rope_type`` "llama3" of HF)."""

    factor: float = Field(ge=1)
    """How much slower."""
    low_freq_factor: PositiveFloat
    """Turns within the first context below which all of ``factor`` counts."""
    high_freq_factor: PositiveFloat
    """Turns within the first context above which nothing changes."""
    original_max_position_embeddings: PositiveInt
    """Longest text of the first training [tokens]."""

    @model_validator(mode="after")
    def _ends_in_order(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor:g} must be above low_freq_factor "
                f"{self.low_freq_factor:g}; Llama 3 has 4 and 1"
            )
        return self


class ModelConfig(Section):
    """Decoder with RMSNorm, grouped-query attention, SwiGLU and rotary positions, without biases.

    Weights of every family can be laid out, moved and converted; which of them can be trained says
    ``config.families``.
    """

    family: Literal["qwen3", "qwen3_moe", "llama", "glm4_moe"] = "qwen3"
    """``model_type`` of HF: gives parameters their names."""
    num_hidden_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    """Embedding rows, spare ones included."""
    rope_theta: PositiveFloat = 10_000.0
    rope_scaling: RopeScaling | None = None
    """What follows from it: ``topology.rotary``."""
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = True
    max_position_embeddings: PositiveInt = 4096
    has_qk_norm: bool = True
    """RMSNorm over each query and key head."""
    moe: MoeConfig | None = None


class InitConfig(Section):
    """Random initialisation of a new model (normal distributions, keyed by parameter name and run
    seed)."""

    embedding_std: float = Field(default=0.02, gt=0)
    matrix_gain: float = Field(default=1.0, gt=0)
    """Matrices are drawn with std = gain / sqrt(fan_in); projections into the residual stream are
    scaled further by 1 / sqrt(2 * layers)."""
