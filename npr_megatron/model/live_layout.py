"""What a rank really holds: storages and tiles read from live Megatron modules.

The counterpart of ``weights.layouts.trainer_layout``, which says from the configuration alone what
a rank should hold; the two must agree before anything is loaded, moved or published. So nothing
here is shared with it beyond tiles and HF names: shapes are those of the tensors, ranks those of
the process group of the module that owns a tensor, layers and experts are numbered as the modules
number them. The marks on parameters (``tensor_model_parallel``, ``partition_dim``) are not looked
at: Megatron leaves them off experts that are cut all the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel

from npr_megatron.config.model import ModelConfig
from npr_megatron.errors import LayoutError
from npr_megatron.model.storages import LiveTensor, live_tensors
from npr_megatron.weights.names import (
    EMBEDDING,
    EXPERT_BIAS,
    FINAL_NORM,
    LM_HEAD,
    MLP,
    ROUTER,
    SHARED_EXPERTS,
    expert,
    layer_prefix,
)
from npr_megatron.weights.tiles import (
    Piece,
    RankLayout,
    Rows,
    Storage,
    columns_of,
    cut,
    rank_of,
    rows_of,
    stack,
    whole,
)

_CUTS: dict[str, Literal["rows", "columns", "nothing"]] = {
    "VocabParallelEmbedding": "rows",
    "ColumnParallelLinear": "rows",
    "TEColumnParallelLinear": "rows",
    "TELayerNormColumnParallelLinear": "rows",
    "TEColumnParallelGroupedLinear": "rows",
    "RowParallelLinear": "columns",
    "TERowParallelLinear": "columns",
    "TERowParallelGroupedLinear": "columns",
    "RMSNorm": "nothing",
    "TopKRouter": "nothing",
}
"""How modules cut their weight over their process group, by class name: TransformerEngine's
classes exist on CUDA only."""
_NORM_INSIDE = "layer_norm_weight"
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.linear_fc([12])\.weight$")
_Rule = Callable[[LiveTensor, ModelConfig], Piece]


def live_layout(chunks: Sequence[GPTModel], model: ModelConfig) -> RankLayout:
    """Return what the model chunks of this rank hold, as tiles of the parameters of ``model``.

    Of ``model`` only names and the number of tokens are used; everything else is what is there.

    Raises:
        LayoutError: a parameter, buffer, module or dtype is unknown; the message lists all.
    """
    pieces: list[Piece] = []
    problems = [problem for chunk in chunks for problem in _unknown_settings(chunk)]
    for live in live_tensors(chunks):
        try:
            pieces.append(_piece(live, model))
        except LayoutError as error:
            problems.append(f"{live.local_name} {list(live.tensor.shape)}: {error}")
    if problems:
        raise LayoutError("\n".join(problems))
    return rank_of(pieces)


def check_live_layout(live: RankLayout, declared: RankLayout) -> None:
    """Require that a rank holds what its configuration says; the order of storages is free.

    Raises:
        LayoutError: the message lists every difference.
    """
    found, expected = _by_storage(live), _by_storage(declared)
    problems = [
        f"storage {name}: Megatron built {found.get(name, 'none')}, "
        f"the configuration says {expected.get(name, 'none')}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if problems:
        raise LayoutError("\n".join(problems))


def _by_storage(rank: RankLayout) -> dict[str, str]:
    described = {
        storage.name: [f"{storage.dtype or 'weights'} {list(storage.shape)}"]
        for storage in rank.storages
    }
    for tile in sorted(rank.tiles, key=lambda tile: tile.at):
        ranges = ", ".join(f"{a}:{b}" for a, b in zip(tile.box.start, tile.box.stop, strict=True))
        described[tile.storage].append(f"{tile.parameter}[{ranges}] at {list(tile.at)}")
    return {name: "; ".join(lines) for name, lines in described.items()}


def _unknown_settings(chunk: GPTModel) -> list[str]:
    config = chunk.config
    known = {
        "gated_linear_unit": True,
        "layernorm_zero_centered_gamma": False,
        "use_kitchen": False,
    }
    return [
        f"TransformerConfig.{name} is {getattr(config, name)}; weights can be laid out where it "
        f"is {value}"
        for name, value in known.items()
        if getattr(config, name) != value
    ]


def _piece(live: LiveTensor, model: ModelConfig) -> Piece:
    rule = _rule(live)
    pinned = live.inner_name == "mlp.router.expert_bias"
    expected = torch.float32 if pinned else live.chunk.config.params_dtype
    if live.tensor.dtype != expected:
        raise LayoutError(f"is {live.tensor.dtype}, expected {expected}")
    storage, tiles = rule(live, model)
    if storage.shape != tuple(live.tensor.shape):
        raise LayoutError(f"its module asks for shape {list(storage.shape)}")
    return Storage(storage.name, storage.shape, "fp32" if pinned else None), tiles


def _rule(live: LiveTensor) -> _Rule:
    if live.layer is None:
        rule = _OUTSIDE_LAYERS.get(live.inner_name)
    elif _EXPERT.match(live.inner_name):
        rule = _expert
    else:
        rule = _IN_LAYERS.get(live.inner_name)
    if rule is None:
        raise LayoutError("is no weight of a model that can be laid out")
    return rule


def _shard(live: LiveTensor, expected: str) -> tuple[int, int]:
    """Return rank and size of the group that ``live`` is cut over, as ``expected``."""
    owner = live.owner
    classes = [kind.__name__ for kind in type(owner).__mro__]
    cut_over = next((_CUTS[name] for name in classes if name in _CUTS), None)
    if live.local_name.endswith(_NORM_INSIDE):
        cut_over = "nothing"
    if cut_over != expected:
        raise LayoutError(
            f"belongs to a {classes[0]}, expected a module that cuts {expected} of its weight"
        )
    if expected == "nothing":
        return 0, 1
    # TransformerEngine's own tp_group is None until it communicates.
    group = owner._tp_group if hasattr(owner, "_tp_group") else owner.tp_group
    return group.rank(), group.size()


def _vocabulary(live: LiveTensor, parameter: str, model: ModelConfig) -> Piece:
    """Rows that are no token's are padding."""
    rank, _ = _shard(live, "rows")
    num_rows, hidden = live.tensor.shape
    start = min(rank * num_rows, model.vocab_size)
    stop = min((rank + 1) * num_rows, model.vocab_size)
    tokens = [Rows(parameter, start, stop)] if start < stop else []
    storage, tiles = stack(live.name, tokens, hidden)
    return Storage(storage.name, (num_rows, hidden)), tiles


def _embedding(live: LiveTensor, model: ModelConfig) -> Piece:
    return _vocabulary(live, EMBEDDING, model)


def _head(live: LiveTensor, model: ModelConfig) -> Piece:
    tied = live.chunk.share_embeddings_and_output_weights
    return _vocabulary(live, EMBEDDING if tied else LM_HEAD, model)


def _final_norm(live: LiveTensor, _: ModelConfig) -> Piece:
    _shard(live, "nothing")
    return whole(live.name, FINAL_NORM, tuple(live.tensor.shape))


def _replicated(name: str) -> _Rule:
    def rule(live: LiveTensor, _: ModelConfig) -> Piece:
        _shard(live, "nothing")
        return whole(live.name, _parameter(live, name), tuple(live.tensor.shape))

    return rule


def _qkv(live: LiveTensor, _: ModelConfig) -> Piece:
    """Per kv head its query heads, its key head, its value head; cut blindly."""
    config: Any = live.chunk.config
    groups, head_dim = config.num_query_groups, config.kv_channels
    query_rows = config.num_attention_heads // groups * head_dim
    fused = [
        Rows(
            _parameter(live, f"self_attn.{side}_proj.weight"), group * height, (group + 1) * height
        )
        for group in range(groups)
        for side, height in (("q", query_rows), ("k", head_dim), ("v", head_dim))
    ]
    rank, size = _shard(live, "rows")
    num_rows, hidden = live.tensor.shape
    fused_rows = sum(rows.count for rows in fused)
    if num_rows * size != fused_rows:
        raise LayoutError(f"{size} such shards do not make the {fused_rows} rows of q, k and v")
    return stack(live.name, cut(fused, rank * num_rows, (rank + 1) * num_rows), hidden)


def _columns(name: str) -> _Rule:
    def rule(live: LiveTensor, _: ModelConfig) -> Piece:
        rank, size = _shard(live, "columns")
        height, width = live.tensor.shape
        return columns_of(live.name, _parameter(live, name), (height, width * size), rank, size)

    return rule


def _gate_up(mlp: str) -> _Rule:
    def rule(live: LiveTensor, _: ModelConfig) -> Piece:
        rank, size = _shard(live, "rows")
        inner, hidden = live.tensor.shape[0] // 2, live.tensor.shape[1]
        sides = [
            rows_of(_parameter(live, f"{mlp}.{side}_proj.weight"), inner * size, rank, size)
            for side in ("gate", "up")
        ]
        return stack(live.name, sides, hidden)

    return rule


def _expert(live: LiveTensor, model: ModelConfig) -> Piece:
    match = _EXPERT.match(live.inner_name)
    assert match is not None
    moe_layer = live.local_name.partition(".experts.")[0]
    experts: Any = live.chunk.get_submodule(moe_layer)
    name = expert(experts.local_expert_indices[int(match[1])])
    rule = _gate_up(name) if match[2] == "1" else _columns(f"{name}.down_proj.weight")
    return rule(live, model)


def _parameter(live: LiveTensor, name: str) -> str:
    assert live.layer is not None
    return layer_prefix(live.layer) + name


_OUTSIDE_LAYERS: dict[str, _Rule] = {
    "embedding.word_embeddings.weight": _embedding,
    "decoder.final_layernorm.weight": _final_norm,
    "output_layer.weight": _head,
}
_IN_LAYERS: dict[str, _Rule] = {
    "input_layernorm.weight": _replicated("input_layernorm.weight"),
    "self_attention.linear_qkv.weight": _qkv,
    "self_attention.q_layernorm.weight": _replicated("self_attn.q_norm.weight"),
    "self_attention.k_layernorm.weight": _replicated("self_attn.k_norm.weight"),
    "self_attention.linear_proj.weight": _columns("self_attn.o_proj.weight"),
    "pre_mlp_layernorm.weight": _replicated("post_attention_layernorm.weight"),
    "mlp.linear_fc1.weight": _gate_up(MLP),
    "mlp.linear_fc2.weight": _columns(f"{MLP}.down_proj.weight"),
    "mlp.router.weight": _replicated(ROUTER),
    "mlp.router.expert_bias": _replicated(EXPERT_BIAS),
    "mlp.shared_experts.linear_fc1.weight": _gate_up(SHARED_EXPERTS),
    "mlp.shared_experts.linear_fc2.weight": _columns(f"{SHARED_EXPERTS}.down_proj.weight"),
}
