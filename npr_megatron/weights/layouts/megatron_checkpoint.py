"""Megatron's ``torch_dist`` checkpoints of a GPT model, declared as tiles. No torch, no Megatron.

One more layout, of one rank: its storages are the global tensors by the keys that Megatron-core
saves them under. Layers of equal shape are stacked on a leading axis, experts on the next one;
where some layers are dense and others have experts, every layer has keys of its own. Gate rows
precede up rows over the whole tensor, unlike on a trainer's rank, and qkv rows are in Megatron's
fused order. Norms before a projection have TransformerEngine's names, whatever built the model.

How a writer was laid out shows in the chunks only (``chunking``), never in keys or shapes, but
for the vocabulary: its rows are padded to what that writer's TP asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from npr_megatron.config.model import ModelConfig
from npr_megatron.errors import LayoutError
from npr_megatron.weights.box import Index
from npr_megatron.weights.names import (
    EMBEDDING,
    EXPERT_BIAS,
    FINAL_NORM,
    LM_HEAD,
    MLP,
    ROUTER,
    SHARED_EXPERTS,
    expert,
    experts_of,
    layer_prefix,
)
from npr_megatron.weights.tiles import (
    Layout,
    Piece,
    PinnedDtype,
    RankLayout,
    Rows,
    Storage,
    Tile,
    stack,
    whole,
)

EMBEDDING_KEY = "embedding.word_embeddings.weight"
HEAD_KEY = "output_layer.weight"
_LAYERS = "decoder.layers."
_NORM_IN_MLP = "mlp.linear_fc1.layer_norm_weight"
_NORM_BEFORE_EXPERTS = "pre_mlp_layernorm.weight"
_EXPERTS = "mlp.experts.experts."


@dataclass(frozen=True, slots=True)
class CheckpointForm:
    """What two checkpoints of one model may spell differently."""

    is_stacked: bool
    """Layers share keys, along a leading axis."""
    expert_norms: tuple[str, ...]
    """Keys of the norm before the experts: TransformerEngine's, that of the local modules, or
    both (replicas)."""
    vocabulary_rows: int
    """Rows of embedding and head, padding included."""


def form_to_write(model: ModelConfig) -> CheckpointForm:
    """Return the form that ranks of every build can load: the norm before experts has both keys."""
    return CheckpointForm(
        is_stacked=not _is_mixed(model),
        expert_norms=(_NORM_BEFORE_EXPERTS, _NORM_IN_MLP),
        vocabulary_rows=model.vocab_size,
    )


def form_found(model: ModelConfig, shapes: Mapping[str, Index]) -> CheckpointForm:
    """Return the form of a checkpoint with tensors of ``shapes``; deviations are found later."""
    first = model.moe.num_dense_layers if model.moe else 0
    is_stacked = f"{_LAYERS}self_attention.linear_qkv.weight" in shapes
    here = _LAYERS if is_stacked else f"{_LAYERS}{first}."
    found = tuple(
        norm for norm in (_NORM_BEFORE_EXPERTS, _NORM_IN_MLP) if f"{here}{norm}" in shapes
    )
    rows = shapes.get(EMBEDDING_KEY, (model.vocab_size,))[0]
    return CheckpointForm(is_stacked, found or (_NORM_BEFORE_EXPERTS,), max(rows, model.vocab_size))


def megatron_checkpoint_layout(model: ModelConfig, form: CheckpointForm | None = None) -> Layout:
    """Return the layout of a ``torch_dist`` checkpoint of ``model``; default: the one we write.

    Raises:
        LayoutError: a stacked form was asked for layers that differ.
    """
    form = form or form_to_write(model)
    if form.is_stacked and _is_mixed(model):
        raise LayoutError(
            "a checkpoint stacks its layers, the model has dense ones and ones with experts; "
            "the two do not belong together"
        )
    hidden = model.hidden_size
    pieces = [_vocabulary(EMBEDDING_KEY, EMBEDDING, model, form)]
    for layer in range(model.num_hidden_layers):
        pieces += _layer(model, form, layer)
    pieces.append(whole("decoder.final_layernorm.weight", FINAL_NORM, (hidden,)))
    if not model.tie_word_embeddings:
        pieces.append(_vocabulary(HEAD_KEY, LM_HEAD, model, form))
    # stacked layers declare one storage each time: once is enough
    storages = {storage.name: storage for storage, _ in pieces}
    tiles = tuple(tile for _, filled in pieces for tile in filled)
    return Layout("torch_dist", (RankLayout(tuple(storages.values()), tiles),))


def _is_mixed(model: ModelConfig) -> bool:
    return model.moe is not None and model.moe.num_dense_layers > 0


def _vocabulary(key: str, parameter: str, model: ModelConfig, form: CheckpointForm) -> Piece:
    storage, tiles = stack(key, [Rows(parameter, 0, model.vocab_size)], model.hidden_size)
    return replace(storage, shape=(form.vocabulary_rows, model.hidden_size)), tiles


def _layer(model: ModelConfig, form: CheckpointForm, layer: int) -> Iterator[Piece]:
    hidden, prefix = model.hidden_size, layer_prefix(layer)
    moe = experts_of(model, layer)

    def vector(key: str, own: str, size: int, dtype: PinnedDtype | None = None) -> Piece:
        storage, tiles = whole(key, prefix + own, (size,))
        return _placed(model, form, layer, (replace(storage, dtype=dtype), tiles))

    def matrix(key: str, segments: Sequence[Rows], width: int) -> Piece:
        return _placed(model, form, layer, stack(key, segments, width))

    yield vector("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", hidden)
    yield matrix("self_attention.linear_qkv.weight", _fused_qkv_rows(model, prefix), hidden)
    if model.has_qk_norm:
        for side in ("q", "k"):
            key, own = f"self_attention.{side}_layernorm.weight", f"self_attn.{side}_norm.weight"
            yield vector(key, own, model.head_dim)
    output = Rows(f"{prefix}self_attn.o_proj.weight", 0, hidden)
    width = model.num_attention_heads * model.head_dim
    yield matrix("self_attention.linear_proj.weight", [output], width)
    for norm in form.expert_norms if moe else (_NORM_IN_MLP,):
        yield vector(norm, "post_attention_layernorm.weight", hidden)
    if moe is None:
        yield from _gated(model, form, layer, "mlp.", MLP, model.intermediate_size)
        return
    yield matrix("mlp.router.weight", [Rows(prefix + ROUTER, 0, moe.num_experts)], hidden)
    if moe.has_expert_bias:
        yield vector("mlp.router.expert_bias", EXPERT_BIAS, moe.num_experts, "fp32")
    for number in range(moe.num_experts):
        inner = moe.moe_intermediate_size
        yield from _gated(model, form, layer, _EXPERTS, expert(number), inner, number)
    if shared := moe.shared_intermediate_size:
        yield from _gated(model, form, layer, "mlp.shared_experts.", SHARED_EXPERTS, shared)


def _gated(
    model: ModelConfig,
    form: CheckpointForm,
    layer: int,
    key: str,
    own: str,
    inner: int,
    number: int | None = None,
) -> Iterator[Piece]:
    """Yield the two matrices of one MLP; ``number``: the expert it is."""
    prefix = layer_prefix(layer) + own
    up = [Rows(f"{prefix}.{side}_proj.weight", 0, inner) for side in ("gate", "up")]
    first = stack(f"{key}linear_fc1.weight", up, model.hidden_size)
    yield _placed(model, form, layer, first, number)
    down = [Rows(f"{prefix}.down_proj.weight", 0, model.hidden_size)]
    second = stack(f"{key}linear_fc2.weight", down, inner)
    yield _placed(model, form, layer, second, number)


def _fused_qkv_rows(model: ModelConfig, prefix: str) -> list[Rows]:
    """Megatron's fused order: per kv head its query heads, its key head, its value head."""
    d = model.head_dim
    heights = {"q": model.num_attention_heads // model.num_key_value_heads * d, "k": d, "v": d}
    return [
        Rows(f"{prefix}self_attn.{side}_proj.weight", group * height, (group + 1) * height)
        for group in range(model.num_key_value_heads)
        for side, height in heights.items()
    ]


def _placed(
    model: ModelConfig, form: CheckpointForm, layer: int, piece: Piece, number: int | None = None
) -> Piece:
    """Return ``piece``, named by its key inside a layer, where it is in the checkpoint."""
    storage, tiles = piece
    axes: list[tuple[int, int]] = [(layer, model.num_hidden_layers)] if form.is_stacked else []
    if number is not None and model.moe is not None:
        axes.append((number, model.moe.num_experts))
    key = f"{_LAYERS}{storage.name}" if form.is_stacked else f"{_LAYERS}{layer}.{storage.name}"
    at, extents = tuple(a for a, _ in axes), tuple(n for _, n in axes)
    return (
        Storage(key, extents + storage.shape, storage.dtype),
        tuple(Tile(tile.parameter, tile.box, key, at + tile.at) for tile in tiles),
    )


def layer_of(key: str, lead: Index) -> int | None:
    """Return the layer that ``key`` belongs to, at leading indices ``lead``; None outside layers.

    Example:
        ``decoder.layers.3.mlp.router.weight`` and ``decoder.layers.mlp.router.weight`` at (3,)
        both give 3.
    """
    if not key.startswith(_LAYERS):
        return None
    first = key.removeprefix(_LAYERS).split(".", 1)[0]
    return int(first) if first.isdigit() else lead[0]


def extra_state_keys(model: ModelConfig) -> list[str]:
    """Return the keys of the empty objects that Megatron saves beside each linear module.

    Loading is an error without them. They are those of the local modules; a build with
    TransformerEngine may ask for more and is then to be told not to (``strict``).
    """
    form = form_to_write(model)
    names: list[str] = []
    for storage in megatron_checkpoint_layout(model, form).ranks[0].storages:
        if ".linear_" not in storage.name or not storage.name.endswith(".weight"):
            continue
        grid = storage.shape[:-2]
        sizes = ".".join(map(str, grid)) or "1"
        name = storage.name.removesuffix("weight") + "_extra_state"
        names += [
            f"{name}/shard_{'.'.join(map(str, place)) or '0'}_{sizes}"
            for place in product(*map(range, grid))
        ]
    return names
