"""The parameters of a dense Qwen3 decoder under their HF names: the coordinates of this package.

Every layout states where pieces of these parameters live. There is no other name table. A tied
model has no ``lm_head.weight``: its head is the embedding, however many copies a trainer keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from npr_megatron.config.model import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One canonical tensor."""

    name: str
    shape: tuple[int, ...]
    """[out, in], row major; [n] for norms."""


def layer_parameter(layer: int, suffix: str) -> str:
    """Return the HF name of a parameter of decoder layer ``layer`` (from 0)."""
    return f"model.layers.{layer}.{suffix}.weight"


def head_parameter(model: ModelConfig) -> str:
    """Return the name of the parameter that the output head multiplies with."""
    return EMBEDDING if model.tie_word_embeddings else LM_HEAD


def canonical_parameters(model: ModelConfig) -> tuple[Parameter, ...]:
    """Return every parameter of ``model``, in the order of the forward pass."""
    vocabulary_shape = (model.vocab_size, model.hidden_size)
    parameters = [Parameter(EMBEDDING, vocabulary_shape)]
    for layer in range(model.num_hidden_layers):
        parameters += [
            Parameter(layer_parameter(layer, suffix), shape)
            for suffix, shape in _layer_shapes(model).items()
        ]
    parameters.append(Parameter(FINAL_NORM, (model.hidden_size,)))
    if not model.tie_word_embeddings:
        parameters.append(Parameter(LM_HEAD, vocabulary_shape))
    return tuple(parameters)


def _layer_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = model.hidden_size, model.intermediate_size
    query_rows = model.num_attention_heads * model.head_dim
    key_rows = model.num_key_value_heads * model.head_dim
    return {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query_rows, hidden),
        "self_attn.k_proj": (key_rows, hidden),
        "self_attn.v_proj": (key_rows, hidden),
        "self_attn.q_norm": (model.head_dim,),
        "self_attn.k_norm": (model.head_dim,),
        "self_attn.o_proj": (hidden, query_rows),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
