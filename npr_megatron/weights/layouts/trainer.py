"""The trainer's layout: Megatron's GPT model over TP x CP x EP x ETP x DP x PP, any pipeline split.

Storages carry the names of Megatron's local spec with the global layer number and the local expert
number (``decoder.layers.7.mlp.experts.local_experts.0.linear_fc1.weight``); what other specs call
them is the business of whoever holds live modules. Weights depend on a rank's stage, tp, ep and etp
only; ranks alike in these share one ``RankLayout``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.config.parallel_check import layout_problems
from npr_megatron.config.pipeline import split_layers
from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import LayoutError
from npr_megatron.weights.layouts.parts import Shapes, gated_rows, layer_shapes
from npr_megatron.weights.layouts.ranks import place_of
from npr_megatron.weights.names import (
    EMBEDDING,
    EXPERT_BIAS,
    FINAL_NORM,
    MLP,
    ROUTER,
    SHARED_EXPERTS,
    expert,
    experts_of,
    head_parameter,
    layer_prefix,
)
from npr_megatron.weights.tiles import (
    Layout,
    Piece,
    Prefixed,
    RankLayout,
    Rows,
    columns_of,
    cut,
    padded_rows,
    rank_of,
    renamed,
    stack,
    whole,
)


@dataclass(frozen=True, slots=True)
class _Shard:
    """All that the weights of a layer depend on, besides the layer."""

    tp: int
    ep: int
    etp: int


def trainer_layout(model: ModelConfig, parallel: ParallelConfig) -> Layout:
    """Return the layout of Megatron's GPT model (SwiGLU, no biases).

    Data- and context-parallel ranks are replicas; so is the head of a tied model on a last stage
    that is not the first. Megatron cuts its fused qkv matrix blindly, so with more TP ranks than kv
    heads a shard may begin inside a head. Rows of embedding and head are padded to a multiple of
    ``vocab_divisor * tp``; no tile reaches the padding.

    Raises:
        LayoutError: sizes do not divide, or the pipeline cannot be split as asked; the message
            lists every problem.
    """
    if problems := layout_problems(model, parallel):
        raise LayoutError("\n".join(problems))
    stages = split_layers(model.num_hidden_layers, parallel)
    declaration = _Declaration(model, parallel)
    known: dict[tuple[int, _Shard], RankLayout] = {}
    ranks: list[RankLayout] = []
    for rank in range(parallel.world_size):
        place = place_of(parallel, rank)
        shard = declaration.shard(place.tp, place.ep, place.etp)
        key = (place.stage, shard)
        if key not in known:
            layers = [layer for chunk in stages[place.stage] for layer in chunk]
            known[key] = rank_of([*declaration.stage(place.stage, layers, shard)])
        ranks.append(known[key])
    return Layout("trainer", tuple(ranks))


class _Declaration:
    """The pieces of every shard, each cut once."""

    def __init__(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        self._model, self._parallel = model, parallel
        layers = range(model.num_hidden_layers)
        self._parameters = [Prefixed(layer_prefix(layer)) for layer in layers]
        self._storages = [Prefixed(f"decoder.layers.{layer}.") for layer in layers]
        self._layers: dict[tuple[bool, _Shard], list[Piece]] = {}

    def shard(self, tp: int, ep: int, etp: int) -> _Shard:
        """Return the shard at these coordinates; a dense model knows tp only."""
        return _Shard(tp, 0, 0) if self._model.moe is None else _Shard(tp, ep, etp)

    def stage(self, stage: int, layers: list[int], shard: _Shard) -> Iterator[Piece]:
        """Yield what a rank of pipeline stage ``stage`` holds."""
        model, last = self._model, self._parallel.pp_size - 1
        if stage == 0:
            yield self._vocabulary("embedding.word_embeddings.weight", EMBEDDING, shard.tp)
        for layer in layers:
            pieces = self._layer(experts_of(model, layer), shard)
            yield from renamed(pieces, self._parameters[layer], self._storages[layer])
        if stage == last:
            yield whole("decoder.final_layernorm.weight", FINAL_NORM, (model.hidden_size,))
            if not model.tie_word_embeddings or stage != 0:
                yield self._vocabulary("output_layer.weight", head_parameter(model), shard.tp)

    def _vocabulary(self, storage: str, parameter: str, tp: int) -> Piece:
        shape = (self._model.vocab_size, self._model.hidden_size)
        num_rows = self._parallel.padded_vocab_size(self._model.vocab_size)
        return padded_rows(storage, parameter, shape, num_rows, tp, self._parallel.tp_size)

    def _layer(self, moe: MoeConfig | None, shard: _Shard) -> list[Piece]:
        key = (moe is None, shard)
        if key not in self._layers:
            self._layers[key] = self._cut_layer(moe, shard)
        return self._layers[key]

    def _cut_layer(self, moe: MoeConfig | None, shard: _Shard) -> list[Piece]:
        model, tp_size = self._model, self._parallel.tp_size
        shapes = layer_shapes(model, moe)
        pieces = [
            _copied("input_layernorm.weight", "input_layernorm.weight", shapes),
            *_attention(model, shapes, shard.tp, tp_size),
            _copied("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", shapes),
        ]
        if moe is None:
            return [*pieces, *_mlp("mlp", MLP, shapes, shard.tp, tp_size)]
        pieces += self._experts(moe, shapes, shard)
        if moe.shared_intermediate_size:
            pieces += _mlp("mlp.shared_experts", SHARED_EXPERTS, shapes, shard.tp, tp_size)
        return pieces

    def _experts(self, moe: MoeConfig, shapes: Shapes, shard: _Shard) -> Iterator[Piece]:
        yield _copied("mlp.router.weight", ROUTER, shapes)
        if moe.has_expert_bias:
            yield whole("mlp.router.expert_bias", EXPERT_BIAS, shapes[EXPERT_BIAS], "fp32")
        num_local = moe.num_experts // self._parallel.ep_size
        etp_size = self._parallel.expert_tp_size
        for local in range(num_local):
            own = f"mlp.experts.local_experts.{local}"
            yield from _mlp(own, expert(shard.ep * num_local + local), shapes, shard.etp, etp_size)


def _attention(model: ModelConfig, shapes: Shapes, tp: int, tp_size: int) -> Iterator[Piece]:
    fused = _fused_qkv_rows(model)
    num_rows = sum(rows.count for rows in fused) // tp_size
    shard = cut(fused, tp * num_rows, (tp + 1) * num_rows)
    yield stack("self_attention.linear_qkv.weight", shard, model.hidden_size)
    for side in ("q", "k") if model.has_qk_norm else ():
        storage = f"self_attention.{side}_layernorm.weight"
        yield _copied(storage, f"self_attn.{side}_norm.weight", shapes)
    output = "self_attn.o_proj.weight"
    yield columns_of("self_attention.linear_proj.weight", output, shapes[output], tp, tp_size)


def _fused_qkv_rows(model: ModelConfig) -> list[Rows]:
    """Megatron's fused order: per kv head its query heads, its key head, its value head."""
    d = model.head_dim
    query_rows = model.num_attention_heads // model.num_key_value_heads * d
    heights = (("q", query_rows), ("k", d), ("v", d))
    return [
        Rows(f"self_attn.{side}_proj.weight", group * height, (group + 1) * height)
        for group in range(model.num_key_value_heads)
        for side, height in heights
    ]


def _mlp(own: str, hf: str, shapes: Shapes, part: int, num_parts: int) -> Iterator[Piece]:
    down = f"{hf}.down_proj.weight"
    rows = gated_rows(hf, shapes, part, num_parts)
    yield stack(f"{own}.linear_fc1.weight", rows, shapes[down][0])
    yield columns_of(f"{own}.linear_fc2.weight", down, shapes[down], part, num_parts)


def _copied(storage: str, parameter: str, shapes: Shapes) -> Piece:
    """Every rank of the stage holds the whole parameter."""
    return whole(storage, parameter, shapes[parameter])
