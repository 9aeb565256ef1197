"""Where every element of a model lives: pure declarations of the trainer, engine and HF layouts.

A new parallelism or engine is a new declaration here; planner, verifier, digest and executors know
nothing but tiles. Sizes that do not divide are refused here. Deliberately no padding: vocabulary
rows are cut evenly.
"""

from __future__ import annotations

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import LayoutError
from npr_megatron.weights.names import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    canonical_parameters,
    head_parameter,
    layer_parameter,
)
from npr_megatron.weights.tiles import (
    Layout,
    Piece,
    RankLayout,
    Rows,
    columns_of,
    cut,
    rank_of,
    rows_of,
    stack,
    whole,
)


def canonical_layout(model: ModelConfig) -> Layout:
    """Return the layout of an HF checkpoint: one rank, one storage per parameter."""
    pieces = [whole(p.name, p.name, p.shape) for p in canonical_parameters(model)]
    return Layout("canonical", (rank_of(pieces),))


def trainer_layout(model: ModelConfig, parallel: ParallelConfig) -> Layout:
    """Return the layout of Megatron's GPT model (local spec, SwiGLU) over a TP x DP x PP world.

    World rank = tp_rank + tp_size * (dp_rank + dp_size * pp_rank). Storages carry Megatron's names
    with the global layer number. Data-parallel ranks are replicas; so is the head of a tied model
    on a last stage that is not the first. Megatron cuts its fused qkv matrix blindly, so with more
    TP ranks than kv heads a shard may begin inside a head.

    Raises:
        LayoutError: sizes do not divide; the message lists every problem.
    """
    problems = _trainer_problems(model, parallel)
    if problems:
        raise LayoutError("\n".join(problems))
    ranks: list[RankLayout] = []
    for stage in range(parallel.pp_size):
        shards = [_trainer_rank(model, parallel, stage, tp) for tp in range(parallel.tp_size)]
        ranks += shards * parallel.dp_size
    return Layout("trainer", tuple(ranks))


def engine_layout(model: ModelConfig, tp_size: int = 1) -> Layout:
    """Return the layout of one engine: SGLang-like fused projections over ``tp_size`` ranks.

    With more ranks than kv heads, each kv head is held by ``tp_size / num_key_value_heads``
    neighbouring ranks.

    Raises:
        LayoutError: sizes do not divide; the message lists every problem.
    """
    problems = _divisibility(model, tp_size, "engine tp_size")
    if problems:
        raise LayoutError("\n".join(problems))
    return Layout("engine", tuple(_engine_rank(model, tp_size, tp) for tp in range(tp_size)))


def _trainer_rank(model: ModelConfig, parallel: ParallelConfig, stage: int, tp: int) -> RankLayout:
    tp_size, last = parallel.tp_size, parallel.pp_size - 1
    num_layers = model.num_hidden_layers // parallel.pp_size
    pieces: list[Piece] = []
    if stage == 0:
        rows = rows_of(EMBEDDING, model.vocab_size, tp, tp_size)
        pieces.append(stack("embedding.word_embeddings.weight", [rows], model.hidden_size))
    for layer in range(stage * num_layers, (stage + 1) * num_layers):
        pieces += _trainer_layer(model, tp_size, layer, tp)
    if stage == last:
        pieces.append(whole("decoder.final_layernorm.weight", FINAL_NORM, (model.hidden_size,)))
        if not model.tie_word_embeddings or stage != 0:
            rows = rows_of(head_parameter(model), model.vocab_size, tp, tp_size)
            pieces.append(stack("output_layer.weight", [rows], model.hidden_size))
    return rank_of(pieces)


def _trainer_layer(model: ModelConfig, tp_size: int, layer: int, tp: int) -> list[Piece]:
    hidden, inner, head_dim = model.hidden_size, model.intermediate_size, model.head_dim
    here = f"decoder.layers.{layer}"
    fused = _fused_qkv_rows(model, layer)
    qkv_rows = sum(rows.count for rows in fused) // tp_size
    return [
        whole(
            f"{here}.input_layernorm.weight", layer_parameter(layer, "input_layernorm"), (hidden,)
        ),
        stack(
            f"{here}.self_attention.linear_qkv.weight",
            cut(fused, tp * qkv_rows, (tp + 1) * qkv_rows),
            hidden,
        ),
        *(
            whole(
                f"{here}.self_attention.{side}_layernorm.weight",
                layer_parameter(layer, f"self_attn.{side}_norm"),
                (head_dim,),
            )
            for side in ("q", "k")
        ),
        columns_of(
            f"{here}.self_attention.linear_proj.weight",
            layer_parameter(layer, "self_attn.o_proj"),
            (hidden, model.num_attention_heads * head_dim),
            tp,
            tp_size,
        ),
        whole(
            f"{here}.pre_mlp_layernorm.weight",
            layer_parameter(layer, "post_attention_layernorm"),
            (hidden,),
        ),
        stack(f"{here}.mlp.linear_fc1.weight", _gate_up_rows(model, layer, tp, tp_size), hidden),
        columns_of(
            f"{here}.mlp.linear_fc2.weight",
            layer_parameter(layer, "mlp.down_proj"),
            (hidden, inner),
            tp,
            tp_size,
        ),
    ]


def _fused_qkv_rows(model: ModelConfig, layer: int) -> list[Rows]:
    """Megatron's fused order: per kv head its query heads, its key head, its value head."""
    d = model.head_dim
    query_rows = model.num_attention_heads // model.num_key_value_heads * d
    rows: list[Rows] = []
    for group in range(model.num_key_value_heads):
        for side, height in (("q", query_rows), ("k", d), ("v", d)):
            name = layer_parameter(layer, f"self_attn.{side}_proj")
            rows.append(Rows(name, group * height, (group + 1) * height))
    return rows


def _gate_up_rows(model: ModelConfig, layer: int, tp: int, tp_size: int) -> list[Rows]:
    return [
        rows_of(layer_parameter(layer, f"mlp.{side}_proj"), model.intermediate_size, tp, tp_size)
        for side in ("gate", "up")
    ]


def _engine_rank(model: ModelConfig, tp_size: int, tp: int) -> RankLayout:
    hidden = model.hidden_size
    rows = rows_of(EMBEDDING, model.vocab_size, tp, tp_size)
    pieces = [stack("embed_tokens.weight", [rows], hidden)]
    for layer in range(model.num_hidden_layers):
        pieces += _engine_layer(model, tp_size, layer, tp)
    pieces.append(whole("norm.weight", FINAL_NORM, (hidden,)))
    if not model.tie_word_embeddings:
        rows = rows_of(LM_HEAD, model.vocab_size, tp, tp_size)
        pieces.append(stack("lm_head.weight", [rows], hidden))
    return rank_of(pieces)


def _engine_layer(model: ModelConfig, tp_size: int, layer: int, tp: int) -> list[Piece]:
    hidden, head_dim = model.hidden_size, model.head_dim
    query_width = model.num_attention_heads * head_dim
    kv_shards = min(tp_size, model.num_key_value_heads)
    kv_shard = tp * kv_shards // tp_size
    kv_rows = model.num_key_value_heads * head_dim
    qkv = [
        rows_of(layer_parameter(layer, "self_attn.q_proj"), query_width, tp, tp_size),
        rows_of(layer_parameter(layer, "self_attn.k_proj"), kv_rows, kv_shard, kv_shards),
        rows_of(layer_parameter(layer, "self_attn.v_proj"), kv_rows, kv_shard, kv_shards),
    ]
    vectors = {
        "input_layernorm": ("input_layernorm", hidden),
        "post_attention_layernorm": ("post_attention_layernorm", hidden),
        "q_norm": ("self_attn.q_norm", head_dim),
        "k_norm": ("self_attn.k_norm", head_dim),
    }
    here = f"layers.{layer}"
    matrices = {
        "o_proj": ("self_attn.o_proj", query_width),
        "down_proj": ("mlp.down_proj", model.intermediate_size),
    }
    return [
        stack(f"{here}.qkv_proj.weight", qkv, hidden),
        stack(f"{here}.gate_up_proj.weight", _gate_up_rows(model, layer, tp, tp_size), hidden),
        *(
            columns_of(
                f"{here}.{own}.weight", layer_parameter(layer, hf), (hidden, width), tp, tp_size
            )
            for own, (hf, width) in matrices.items()
        ),
        *(
            whole(f"{here}.{own}.weight", layer_parameter(layer, hf), (length,))
            for own, (hf, length) in vectors.items()
        ),
    ]


def _trainer_problems(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    problems = _divisibility(model, parallel.tp_size, "parallel.tp_size")
    if model.num_hidden_layers % parallel.pp_size:
        problems.append(
            f"num_hidden_layers {model.num_hidden_layers} is not a multiple of parallel.pp_size "
            f"{parallel.pp_size}; choose a divisor of the number of layers"
        )
    qkv_rows = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    if qkv_rows % parallel.tp_size:
        problems.append(
            f"the fused qkv matrix has {qkv_rows} rows, not a multiple of parallel.tp_size "
            f"{parallel.tp_size}; choose one that divides it"
        )
    return problems


def _divisibility(model: ModelConfig, tp_size: int, asked_by: str) -> list[str]:
    problems = [
        f"{name} {value} is not a multiple of {asked_by} {tp_size}; choose one that divides it"
        for name, value in (
            ("num_attention_heads", model.num_attention_heads),
            ("intermediate_size", model.intermediate_size),
            ("vocab_size", model.vocab_size),
        )
        if value % tp_size
    ]
    kv_heads = model.num_key_value_heads
    if model.num_attention_heads % kv_heads:
        problems.append(
            f"num_attention_heads {model.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {kv_heads}; the model description is wrong"
        )
    if kv_heads % tp_size and tp_size % kv_heads:
        problems.append(
            f"num_key_value_heads {kv_heads} and {asked_by} {tp_size} do not divide each other; "
            "choose a tp_size that is a divisor or a multiple of the number of kv heads"
        )
    return problems
