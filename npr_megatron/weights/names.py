"""The parameters of a decoder under their HF names: the coordinates of this package.

Every layout states where pieces of these parameters live. There is no other name table: the
families (Qwen3, Qwen3-MoE, Llama, GLM-4-MoE) share these names and differ in which of them they
have. A tied model has no ``lm_head.weight``: its head is the embedding, however many copies a
trainer keeps. Experts are one parameter each, as checkpoints on disk have them.
"""

from __future__ import annotations

from dataclasses import dataclass

from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.weights.tiles import PinnedDtype

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

# inside a layer
ROUTER = "mlp.gate.weight"
EXPERT_BIAS = "mlp.gate.e_score_correction_bias"
"""Decides which experts are chosen; fp32 always, since its steps vanish in bf16."""
MLP = "mlp"
SHARED_EXPERTS = "mlp.shared_experts"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One canonical tensor."""

    name: str
    shape: tuple[int, ...]
    """[out, in], row major; [n] for norms and biases."""
    dtype: PinnedDtype | None = None
    """None: that of the weights, whichever a checkpoint or a run chose."""


def layer_prefix(layer: int) -> str:
    """Return what the names of decoder layer ``layer`` (from 0) begin with."""
    return f"model.layers.{layer}."


def expert(number: int) -> str:
    """Return what the names of routed expert ``number`` begin with, inside a layer."""
    return f"mlp.experts.{number}"


def head_parameter(model: ModelConfig) -> str:
    """Return the name of the parameter that the output head multiplies with."""
    return EMBEDDING if model.tie_word_embeddings else LM_HEAD


def experts_of(model: ModelConfig, layer: int) -> MoeConfig | None:
    """Return the experts that ``layer`` routes to, None where it has one dense MLP."""
    return model.moe if model.moe and layer >= model.moe.num_dense_layers else None


def canonical_parameters(model: ModelConfig) -> tuple[Parameter, ...]:
    """Return every parameter of ``model``, in the order of the forward pass."""
    vocabulary_shape = (model.vocab_size, model.hidden_size)
    parameters = [Parameter(EMBEDDING, vocabulary_shape)]
    for layer in range(model.num_hidden_layers):
        prefix = layer_prefix(layer)
        parameters += [
            Parameter(prefix + inner.name, inner.shape, inner.dtype)
            for inner in layer_parameters(model, experts_of(model, layer))
        ]
    parameters.append(Parameter(FINAL_NORM, (model.hidden_size,)))
    if not model.tie_word_embeddings:
        parameters.append(Parameter(LM_HEAD, vocabulary_shape))
    return tuple(parameters)


def layer_parameters(model: ModelConfig, moe: MoeConfig | None) -> tuple[Parameter, ...]:
    """Return the parameters of a layer with the experts ``moe``, or a dense one, by the names they
    have inside the layer."""
    hidden, head_dim = model.hidden_size, model.head_dim
    query_rows = model.num_attention_heads * head_dim
    key_rows = model.num_key_value_heads * head_dim
    norms = ("q", "k") if model.has_qk_norm else ()
    parameters = [
        Parameter("input_layernorm.weight", (hidden,)),
        Parameter("self_attn.q_proj.weight", (query_rows, hidden)),
        Parameter("self_attn.k_proj.weight", (key_rows, hidden)),
        Parameter("self_attn.v_proj.weight", (key_rows, hidden)),
        *(Parameter(f"self_attn.{side}_norm.weight", (head_dim,)) for side in norms),
        Parameter("self_attn.o_proj.weight", (hidden, query_rows)),
        Parameter("post_attention_layernorm.weight", (hidden,)),
    ]
    if moe is None:
        parameters += _gated(MLP, model.intermediate_size, hidden)
    else:
        parameters += _experts(moe, hidden)
    return tuple(parameters)


def _experts(moe: MoeConfig, hidden: int) -> list[Parameter]:
    parameters = [Parameter(ROUTER, (moe.num_experts, hidden))]
    if moe.has_expert_bias:
        parameters.append(Parameter(EXPERT_BIAS, (moe.num_experts,), "fp32"))
    for number in range(moe.num_experts):
        parameters += _gated(expert(number), moe.moe_intermediate_size, hidden)
    if moe.shared_intermediate_size:
        parameters += _gated(SHARED_EXPERTS, moe.shared_intermediate_size, hidden)
    return parameters


def _gated(prefix: str, inner: int, hidden: int) -> list[Parameter]:
    return [
        Parameter(f"{prefix}.gate_proj.weight", (inner, hidden)),
        Parameter(f"{prefix}.up_proj.weight", (inner, hidden)),
        Parameter(f"{prefix}.down_proj.weight", (hidden, inner)),
    ]
