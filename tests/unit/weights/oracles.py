"""Storages of any topology cut by plain tensor operations, and the topologies to cut.

Written from the definition of each system's format, sharing nothing with ``weights.layout``: fused
qkv by reshaping to groups, shards by ``chunk``, replicas by indexing heads. Element ids are the
payload: every element of a model has its own number, so a single element in a wrong place shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.names import canonical_parameters

Tensors = dict[str, Tensor]


def tiny_model(**changes) -> ModelConfig:
    """A model that every degree of tp up to 4 divides."""
    sizes = {
        "num_hidden_layers": 4,
        "hidden_size": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 8,
        "vocab_size": 16,
        "tie_word_embeddings": True,
    }
    return ModelConfig(**{**sizes, **changes})


@dataclass(frozen=True)
class Topology:
    """A model, how the trainer holds it and how an engine does."""

    model: ModelConfig
    parallel: ParallelConfig
    engine_tp_size: int


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """TP 1-8, PP 1-4, DP 1-3, kv heads 1-8, engine TP 1-8, tied or not; sizes that divide."""
    kv_heads = draw(st.integers(1, 8))
    fitting = [tp for tp in range(1, 9) if kv_heads % tp == 0 or tp % kv_heads == 0]
    tp, engine_tp = draw(st.sampled_from(fitting)), draw(st.sampled_from(fitting))
    both = math.lcm(tp, engine_tp)
    # with more tp ranks than kv heads the fused matrix is cut inside groups, perhaps inside heads
    head_dim = tp // math.gcd(tp, 2 * kv_heads) * draw(st.integers(1, 2))
    pp = draw(st.integers(1, 4))
    model = tiny_model(
        num_hidden_layers=pp * draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 5)),
        num_attention_heads=math.lcm(both, kv_heads) * draw(st.integers(1, 2)),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=both * draw(st.integers(1, 2)),
        vocab_size=both * draw(st.integers(1, 3)),
        tie_word_embeddings=draw(st.booleans()),
    )
    parallel = ParallelConfig(tp_size=tp, pp_size=pp, dp_size=draw(st.integers(1, 3)))
    return Topology(model, parallel, engine_tp)


def element_ids(model: ModelConfig) -> Tensors:
    """Canonical int64 tensors in which every element has its own number."""
    ids: Tensors = {}
    offset = 1
    for parameter in canonical_parameters(model):
        count = math.prod(parameter.shape)
        ids[parameter.name] = torch.arange(offset, offset + count).view(parameter.shape)
        offset += count
    return ids


def trainer_storages(
    model: ModelConfig, parallel: ParallelConfig, weights: Tensors
) -> list[Tensors]:
    """What Megatron's ranks hold, tp fastest, then dp, then pp."""
    return [
        _trainer_rank(model, parallel, weights, stage, tp)
        for stage in range(parallel.pp_size)
        for _ in range(parallel.dp_size)
        for tp in range(parallel.tp_size)
    ]


def _trainer_rank(
    model: ModelConfig, parallel: ParallelConfig, weights: Tensors, stage: int, tp: int
) -> Tensors:
    def mine(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(parallel.tp_size, dim)[tp].contiguous()

    held: Tensors = {}
    if stage == 0:
        held["embedding.word_embeddings.weight"] = mine(weights["model.embed_tokens.weight"], 0)
    depth = model.num_hidden_layers // parallel.pp_size
    for layer in range(stage * depth, (stage + 1) * depth):
        hf, own = f"model.layers.{layer}", f"decoder.layers.{layer}"
        q, k, v = (weights[f"{hf}.self_attn.{side}_proj.weight"] for side in "qkv")
        by_group = (model.num_key_value_heads, -1, model.head_dim, model.hidden_size)
        fused = torch.cat([q.view(by_group), k.view(by_group), v.view(by_group)], dim=1)
        gate, up = (weights[f"{hf}.mlp.{side}_proj.weight"] for side in ("gate", "up"))
        held |= {
            f"{own}.self_attention.linear_qkv.weight": mine(
                fused.reshape(-1, model.hidden_size), 0
            ),
            f"{own}.self_attention.linear_proj.weight": mine(
                weights[f"{hf}.self_attn.o_proj.weight"], 1
            ),
            f"{own}.mlp.linear_fc1.weight": torch.cat([mine(gate, 0), mine(up, 0)]),
            f"{own}.mlp.linear_fc2.weight": mine(weights[f"{hf}.mlp.down_proj.weight"], 1),
            f"{own}.input_layernorm.weight": weights[f"{hf}.input_layernorm.weight"],
            f"{own}.pre_mlp_layernorm.weight": weights[f"{hf}.post_attention_layernorm.weight"],
            f"{own}.self_attention.q_layernorm.weight": weights[f"{hf}.self_attn.q_norm.weight"],
            f"{own}.self_attention.k_layernorm.weight": weights[f"{hf}.self_attn.k_norm.weight"],
        }
    if stage == parallel.pp_size - 1:
        held["decoder.final_layernorm.weight"] = weights["model.norm.weight"]
        if not model.tie_word_embeddings:
            held["output_layer.weight"] = mine(weights["lm_head.weight"], 0)
        elif parallel.pp_size > 1:
            held["output_layer.weight"] = mine(weights["model.embed_tokens.weight"], 0)
    return held


def engine_storages(model: ModelConfig, tp_size: int, weights: Tensors) -> list[Tensors]:
    """What the ranks of an SGLang-like engine hold."""
    return [_engine_rank(model, tp_size, weights, tp) for tp in range(tp_size)]


def _engine_rank(model: ModelConfig, tp_size: int, weights: Tensors, tp: int) -> Tensors:
    def mine(name: str, dim: int) -> Tensor:
        return weights[name].chunk(tp_size, dim)[tp]

    kv_heads = model.num_key_value_heads
    first = tp * kv_heads // tp_size
    heads = list(range(first, first + max(1, kv_heads // tp_size)))

    def kv(name: str) -> Tensor:
        by_head = weights[name].view(kv_heads, model.head_dim, model.hidden_size)
        return by_head[heads].flatten(0, 1)

    held = {
        "embed_tokens.weight": mine("model.embed_tokens.weight", 0),
        "norm.weight": weights["model.norm.weight"],
    }
    if not model.tie_word_embeddings:
        held["lm_head.weight"] = mine("lm_head.weight", 0)
    for layer in range(model.num_hidden_layers):
        hf, own = f"model.layers.{layer}", f"layers.{layer}"
        attention, mlp = f"{hf}.self_attn", f"{hf}.mlp"
        held |= {
            f"{own}.qkv_proj.weight": torch.cat(
                [
                    mine(f"{attention}.q_proj.weight", 0),
                    kv(f"{attention}.k_proj.weight"),
                    kv(f"{attention}.v_proj.weight"),
                ]
            ),
            f"{own}.o_proj.weight": mine(f"{attention}.o_proj.weight", 1),
            f"{own}.gate_up_proj.weight": torch.cat(
                [mine(f"{mlp}.gate_proj.weight", 0), mine(f"{mlp}.up_proj.weight", 0)]
            ),
            f"{own}.down_proj.weight": mine(f"{mlp}.down_proj.weight", 1),
            f"{own}.q_norm.weight": weights[f"{attention}.q_norm.weight"],
            f"{own}.k_norm.weight": weights[f"{attention}.k_norm.weight"],
            f"{own}.input_layernorm.weight": weights[f"{hf}.input_layernorm.weight"],
            f"{own}.post_attention_layernorm.weight": weights[
                f"{hf}.post_attention_layernorm.weight"
            ],
        }
    return {name: tensor.contiguous() for name, tensor in held.items()}


def by_rank(storages: list[Tensors]) -> dict[int, Tensors]:
    """Storages as executors take them."""
    return dict(enumerate(storages))


def num_different(found: list[Tensors], expected: list[Tensors]) -> int:
    """Elements that differ; storages must be the same ones."""
    assert [one.keys() for one in found] == [one.keys() for one in expected]
    return sum(
        int((one[name] != other[name]).sum())
        for one, other in zip(found, expected, strict=True)
        for name in one
    )
