"""Storages of any topology cut by plain tensor operations.

Written from the definition of each system's format, sharing nothing with ``weights.layouts``: fused
qkv by reshaping to groups, shards by ``chunk``, replicas by indexing heads, ranks by reshaping
numbers to a grid, pipeline stages by dealing out lists of layers. Element ids are the payload:
every element of a model has its own number, so a single element in a wrong place shows; padding
is 0.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.layouts import EngineKind
from npr_megatron.weights.names import canonical_parameters
from tests.unit.weights.topologies import KINDS, Topology, tiny_model, topologies

__all__ = [
    "KINDS",
    "Tensors",
    "Topology",
    "by_rank",
    "element_ids",
    "engine_storages",
    "num_different",
    "source_storages",
    "stages_of",
    "target_storages",
    "tiny_model",
    "topologies",
    "trainer_storages",
]

Tensors = dict[str, Tensor]


def element_ids(model: ModelConfig) -> Tensors:
    """Canonical int64 tensors in which every element has its own number; pinned ones in fp32."""
    ids: Tensors = {}
    offset = 1
    for parameter in canonical_parameters(model):
        count = math.prod(parameter.shape)
        numbers = torch.arange(offset, offset + count).view(parameter.shape)
        ids[parameter.name] = numbers.float() if parameter.dtype == "fp32" else numbers
        offset += count
    assert offset < 2**24  # exact in fp32
    return ids


def source_storages(topology: Topology, weights: Tensors) -> list[Tensors]:
    """What the trainer's ranks hold."""
    return trainer_storages(topology.model, topology.parallel, weights)


def target_storages(topology: Topology, weights: Tensors) -> list[Tensors]:
    """What the engine's ranks hold."""
    return engine_storages(
        topology.model,
        topology.engine_tp_size,
        weights,
        topology.engine_ep_size,
        topology.engine,
    )


def trainer_storages(
    model: ModelConfig, parallel: ParallelConfig, weights: Tensors
) -> list[Tensors]:
    """What Megatron's ranks hold; replicas share their tensors."""
    tp, cp, dp, pp = parallel.tp_size, parallel.cp_size, parallel.dp_size, parallel.pp_size
    ep, etp = parallel.ep_size, parallel.etp_size or parallel.tp_size
    if model.moe is None:
        etp = 1
    world = torch.arange(tp * cp * dp * pp)
    dense, experts = world.view(pp, dp, cp, tp), world.view(pp, -1, ep, etp)
    stages = stages_of(model.num_hidden_layers, parallel)

    @cache
    def held(stage: int, tp_rank: int, ep_rank: int, etp_rank: int) -> Tensors:
        storages = _outside_layers(model, parallel, weights, stage, tp_rank)
        for layer in stages[stage]:
            own, inside = f"decoder.layers.{layer}.", _inside(weights, layer)
            found = _trainer_attention(model, tp, inside, tp_rank)
            if _is_dense(model, layer):
                found |= _megatron_mlp("mlp", "mlp", inside, tp_rank, tp)
            else:
                found |= _trainer_experts(model, parallel, inside, (tp_rank, ep_rank, etp_rank))
            storages |= {own + name: tensor for name, tensor in found.items()}
        return storages

    ranks: list[Tensors] = []
    for rank in range(len(world)):
        stage, _, _, tp_rank = (dense == rank).nonzero()[0].tolist()
        _, _, ep_rank, etp_rank = (experts == rank).nonzero()[0].tolist()
        ranks.append(dict(held(stage, tp_rank, ep_rank, etp_rank)))
    return ranks


def stages_of(num_layers: int, parallel: ParallelConfig) -> list[list[int]]:
    """The layers of each stage: chunks dealt out to the stages in turn, as one deals cards."""
    chunks = _chunks([f"{layer}" for layer in range(num_layers)], parallel)
    stages: list[list[int]] = [[] for _ in range(parallel.pp_size)]
    for number, chunk in enumerate(chunks):
        stages[number % parallel.pp_size] += [int(item) for item in chunk if item.isdigit()]
    return stages


def _chunks(layers: list[str], parallel: ParallelConfig) -> list[list[str]]:
    pp, vpp = parallel.pp_size, parallel.vpp_size
    if parallel.pipeline_layout is not None:
        waiting = iter(layers)
        spelled = "".join(_spelled_out(iter(parallel.pipeline_layout)))
        return [[next(waiting) for _ in range(c.count("t"))] for c in spelled.split("|")]
    first, last = parallel.num_layers_in_first_stage, parallel.num_layers_in_last_stage
    if first is None and last is None:
        slots = ["embedding"] * parallel.account_for_embedding_in_pipeline_split + layers
        slots += ["loss"] * parallel.account_for_loss_in_pipeline_split
        size = len(slots) // (pp * vpp)
        return [slots[start : start + size] for start in range(0, len(slots), size)]
    rest = len(layers) - (first or 0) - (last or 0)
    given = [first] * (first is not None), [last] * (last is not None)
    num_middle = pp - len(given[0]) - len(given[1])
    sizes = [*given[0], *[rest // max(num_middle, 1)] * num_middle, *given[1]]
    waiting = iter(layers)
    return [[next(waiting) for _ in range(size // vpp)] for _ in range(vpp) for size in sizes]


def _spelled_out(letters) -> list[str]:
    """Read up to a closing bracket or the end: a list of items, repeated ones written out."""
    items: list[str] = []
    for letter in letters:
        if letter == ")":
            return items
        if letter == "(":
            items.append("".join(_spelled_out(letters)))
        elif letter == "*":
            items[-1] *= int(next(letters))  # single digits only
        elif letter != ",":
            items.append(letter)
    return items


def _is_dense(model: ModelConfig, layer: int) -> bool:
    return model.moe is None or layer < model.moe.num_dense_layers


def _inside(weights: Tensors, layer: int) -> Tensors:
    prefix = f"model.layers.{layer}."
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def _part(tensor: Tensor, dim: int, part: int, num_parts: int) -> Tensor:
    return tensor.chunk(num_parts, dim)[part].contiguous()


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(-len(tensor) % multiple, tensor.shape[1])])


def _outside_layers(
    model: ModelConfig, parallel: ParallelConfig, weights: Tensors, stage: int, tp: int
) -> Tensors:
    def mine(name: str) -> Tensor:
        multiple = parallel.vocab_divisor * parallel.tp_size
        return _part(_padded(weights[name], multiple), 0, tp, parallel.tp_size)

    held: Tensors = {}
    if stage == 0:
        held["embedding.word_embeddings.weight"] = mine("model.embed_tokens.weight")
    if stage == parallel.pp_size - 1:
        held["decoder.final_layernorm.weight"] = weights["model.norm.weight"]
        if not model.tie_word_embeddings:
            held["output_layer.weight"] = mine("lm_head.weight")
        elif parallel.pp_size > 1:
            held["output_layer.weight"] = mine("model.embed_tokens.weight")
    return held


def _trainer_attention(model: ModelConfig, tp_size: int, inside: Tensors, tp: int) -> Tensors:
    by_group = (model.num_key_value_heads, -1, model.head_dim, model.hidden_size)
    sides = [inside[f"self_attn.{side}_proj.weight"].view(by_group) for side in "qkv"]
    fused = torch.cat(sides, dim=1).reshape(-1, model.hidden_size)
    held = {
        "self_attention.linear_qkv.weight": _part(fused, 0, tp, tp_size),
        "self_attention.linear_proj.weight": _part(
            inside["self_attn.o_proj.weight"], 1, tp, tp_size
        ),
        "input_layernorm.weight": inside["input_layernorm.weight"],
        "pre_mlp_layernorm.weight": inside["post_attention_layernorm.weight"],
    }
    if model.has_qk_norm:
        for side in "qk":
            norm = inside[f"self_attn.{side}_norm.weight"]
            held[f"self_attention.{side}_layernorm.weight"] = norm
    return held


def _gate_and_up(hf: str, inside: Tensors, part: int, num_parts: int) -> Tensor:
    sides = [inside[f"{hf}.{side}_proj.weight"] for side in ("gate", "up")]
    return torch.cat([_part(side, 0, part, num_parts) for side in sides])


def _megatron_mlp(own: str, hf: str, inside: Tensors, part: int, num_parts: int) -> Tensors:
    return {
        f"{own}.linear_fc1.weight": _gate_and_up(hf, inside, part, num_parts),
        f"{own}.linear_fc2.weight": _part(inside[f"{hf}.down_proj.weight"], 1, part, num_parts),
    }


def _trainer_experts(
    model: ModelConfig, parallel: ParallelConfig, inside: Tensors, ranks: tuple[int, int, int]
) -> Tensors:
    moe, (tp, ep, etp) = _moe(model), ranks
    held = {"mlp.router.weight": inside["mlp.gate.weight"]}
    if moe.has_expert_bias:
        held["mlp.router.expert_bias"] = inside["mlp.gate.e_score_correction_bias"]
    mine = torch.arange(moe.num_experts).chunk(parallel.ep_size)[ep].tolist()
    num_parts = parallel.etp_size or parallel.tp_size
    for local, number in enumerate(mine):
        own, hf = f"mlp.experts.local_experts.{local}", f"mlp.experts.{number}"
        held |= _megatron_mlp(own, hf, inside, etp, num_parts)
    if moe.shared_intermediate_size:
        shared = "mlp.shared_experts"
        held |= _megatron_mlp(shared, shared, inside, tp, parallel.tp_size)
    return held


def _moe(model: ModelConfig) -> MoeConfig:
    assert model.moe is not None
    return model.moe


def engine_storages(
    model: ModelConfig,
    tp_size: int,
    weights: Tensors,
    ep_size: int = 1,
    engine: EngineKind = "embedded",
) -> list[Tensors]:
    """What the ranks of an SGLang-like engine hold."""
    return [_engine_rank(model, tp_size, weights, tp, ep_size, engine) for tp in range(tp_size)]


def _engine_rank(
    model: ModelConfig, tp_size: int, weights: Tensors, tp: int, ep_size: int, engine: EngineKind
) -> Tensors:
    is_sglang = engine == "sglang"

    def rows(name: str) -> Tensor:
        return _part(_padded(weights[name], 64 if is_sglang else 1), 0, tp, tp_size)

    start = "model." if is_sglang else ""
    held = {
        f"{start}embed_tokens.weight": rows("model.embed_tokens.weight"),
        f"{start}norm.weight": weights["model.norm.weight"],
    }
    if not model.tie_word_embeddings:
        held["lm_head.weight"] = rows("lm_head.weight")
    for layer in range(model.num_hidden_layers):
        inside = _inside(weights, layer)
        found = _engine_attention(model, tp_size, inside, tp)
        if _is_dense(model, layer):
            found |= _engine_mlp("mlp", inside, tp, tp_size)
        else:
            found |= _engine_experts(model, tp_size, ep_size, inside, tp)
        for name, tensor in found.items():
            own = name if is_sglang else name.removeprefix("self_attn.").removeprefix("mlp.")
            held[f"{start}layers.{layer}.{own}"] = tensor.contiguous()
    return held


def _engine_attention(model: ModelConfig, tp_size: int, inside: Tensors, tp: int) -> Tensors:
    kv_heads = model.num_key_value_heads
    first = tp * kv_heads // tp_size
    heads = list(range(first, first + max(1, kv_heads // tp_size)))

    def kv(side: str) -> Tensor:
        whole = inside[f"self_attn.{side}_proj.weight"]
        return whole.view(kv_heads, model.head_dim, model.hidden_size)[heads].flatten(0, 1)

    query = _part(inside["self_attn.q_proj.weight"], 0, tp, tp_size)
    kept = ("input_layernorm.weight", "post_attention_layernorm.weight")
    if model.has_qk_norm:
        kept += ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
    return {
        "self_attn.qkv_proj.weight": torch.cat([query, kv("k"), kv("v")]),
        "self_attn.o_proj.weight": _part(inside["self_attn.o_proj.weight"], 1, tp, tp_size),
        **{name: inside[name] for name in kept},
    }


def _engine_mlp(hf: str, inside: Tensors, part: int, num_parts: int) -> Tensors:
    return {
        f"{hf}.gate_up_proj.weight": _gate_and_up(hf, inside, part, num_parts),
        f"{hf}.down_proj.weight": _part(inside[f"{hf}.down_proj.weight"], 1, part, num_parts),
    }


def _engine_experts(
    model: ModelConfig, tp_size: int, ep_size: int, inside: Tensors, tp: int
) -> Tensors:
    moe = _moe(model)
    groups = torch.arange(tp_size).view(ep_size, -1)
    group, part = (groups == tp).nonzero()[0].tolist()
    mine = torch.arange(moe.num_experts).view(ep_size, -1)[group].tolist()
    cut = [_engine_mlp(f"mlp.experts.{n}", inside, part, groups.shape[1]) for n in mine]
    held = {
        "mlp.gate.weight": inside["mlp.gate.weight"],
        "mlp.experts.w13_weight": torch.stack(
            [c[f"mlp.experts.{n}.gate_up_proj.weight"] for n, c in zip(mine, cut, strict=True)]
        ),
        "mlp.experts.w2_weight": torch.stack(
            [c[f"mlp.experts.{n}.down_proj.weight"] for n, c in zip(mine, cut, strict=True)]
        ),
    }
    if moe.has_expert_bias:
        bias = "mlp.gate.e_score_correction_bias"
        held[bias] = inside[bias]
    if moe.shared_intermediate_size:
        held |= _engine_mlp("mlp.shared_experts", inside, tp, tp_size)
    return held


def by_rank(storages: list[Tensors]) -> dict[int, Tensors]:
    """Storages as executors take them."""
    return dict(enumerate(storages))


def num_different(found: list[Tensors], expected: list[Tensors]) -> int:
    """Elements that differ; storages must be the same ones, of the same shapes and dtypes."""
    assert [_described(one) for one in found] == [_described(one) for one in expected]
    return sum(
        int((one[name] != other[name]).sum())
        for one, other in zip(found, expected, strict=True)
        for name in one
    )


def _described(storages: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in storages.items()}
