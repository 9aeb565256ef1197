"""Engine layouts: projections fused as SGLang fuses them, over one tensor-parallel group.

The embedded engine and SGLang cut alike; they differ in names and in how vocabulary rows are
padded. Experts are stacked; expert parallelism divides the tensor-parallel group: ``ep`` groups of
neighbouring ranks hold different experts, each cut over the ``tp / ep`` ranks of its group. Only
the plain kernel layout exists: gate above up, rows as HF has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from npr_megatron.config.divisions import (
    attention_problems,
    divides,
    kinds_of_layers,
    mlp_problems,
)
from npr_megatron.config.engine_check import SGLANG_ROW_MULTIPLE
from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.errors import LayoutError
from npr_megatron.weights.box import Box
from npr_megatron.weights.layouts.parts import Shapes, gated_rows, layer_shapes
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
    Prefixed,
    RankLayout,
    Storage,
    Tile,
    columns_of,
    padded_rows,
    rank_of,
    renamed,
    rows_of,
    stack,
    whole,
)

EngineKind = Literal["embedded", "sglang"]


@dataclass(frozen=True, slots=True)
class _Dialect:
    """What distinguishes the engines."""

    model: str
    """Before all names but that of the head."""
    attention: str
    """Before the names of attention inside a layer."""
    mlp: str
    row_multiple: int
    """Vocabulary rows are padded to a multiple of this, then cut evenly."""

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Return the rows of embedding and head over all ranks, padding included."""
        return -(-vocab_size // self.row_multiple) * self.row_multiple


_DIALECTS: dict[EngineKind, _Dialect] = {
    "embedded": _Dialect(model="", attention="", mlp="", row_multiple=1),
    "sglang": _Dialect(
        model="model.", attention="self_attn.", mlp="mlp.", row_multiple=SGLANG_ROW_MULTIPLE
    ),
}


def engine_layout(
    model: ModelConfig, tp_size: int = 1, ep_size: int = 1, engine: EngineKind = "embedded"
) -> Layout:
    """Return the layout of one engine over ``tp_size`` ranks.

    With more ranks than kv heads, each kv head is held by ``tp_size / num_key_value_heads``
    neighbouring ranks. The head of a tied model is the embedding itself: it has no storage.

    Args:
        ep_size: groups of ranks with different experts; divides ``tp_size``.
        engine: whose names and whose padding.

    Raises:
        LayoutError: sizes do not divide; the message lists every problem.
    """
    dialect = _DIALECTS[engine]
    if problems := _problems(model, tp_size, ep_size, dialect):
        raise LayoutError("\n".join(problems))
    layers = range(model.num_hidden_layers)
    parameters = [Prefixed(layer_prefix(layer)) for layer in layers]
    storages = [Prefixed(f"{dialect.model}layers.{layer}.") for layer in layers]
    ranks: list[RankLayout] = []
    for tp in range(tp_size):
        shard = _Shard(model, dialect, tp, tp_size, ep_size)
        kinds = {moe: shard.layer(moe) for moe in kinds_of_layers(model)}
        inner = [
            piece
            for layer in layers
            for piece in renamed(
                kinds[experts_of(model, layer)], parameters[layer], storages[layer]
            )
        ]
        ranks.append(rank_of([*shard.before(), *inner, *shard.after()]))
    return Layout("engine", tuple(ranks))


@dataclass(frozen=True, slots=True)
class _Shard:
    """One rank of the tensor-parallel group."""

    model: ModelConfig
    dialect: _Dialect
    tp: int
    tp_size: int
    ep_size: int

    def before(self) -> list[Piece]:
        """Return what comes before the layers."""
        return [self._vocabulary(f"{self.dialect.model}embed_tokens.weight", EMBEDDING)]

    def after(self) -> list[Piece]:
        """Return what comes after the layers."""
        pieces = [whole(f"{self.dialect.model}norm.weight", FINAL_NORM, (self.model.hidden_size,))]
        if not self.model.tie_word_embeddings:
            pieces.append(self._vocabulary("lm_head.weight", LM_HEAD))
        return pieces

    def _vocabulary(self, storage: str, parameter: str) -> Piece:
        shape = (self.model.vocab_size, self.model.hidden_size)
        num_rows = self.dialect.padded_vocab_size(self.model.vocab_size)
        return padded_rows(storage, parameter, shape, num_rows, self.tp, self.tp_size)

    def layer(self, moe: MoeConfig | None) -> list[Piece]:
        """Return a layer with the experts ``moe``, or a dense one, under names inside it."""
        shapes = layer_shapes(self.model, moe)
        mlp = self.dialect.mlp
        pieces = [*self._attention(shapes)]
        if moe is None:
            pieces += self._mlp(mlp, MLP, shapes)
        else:
            pieces += self._experts(moe, shapes)
            if moe.shared_intermediate_size:
                pieces += self._mlp(f"{mlp}shared_experts.", SHARED_EXPERTS, shapes)
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        return [*pieces, *(whole(name, name, shapes[name]) for name in norms)]

    def _attention(self, shapes: Shapes) -> Iterator[Piece]:
        model, tp, tp_size = self.model, self.tp, self.tp_size
        kv_shards = min(tp_size, model.num_key_value_heads)
        kv_shard = tp * kv_shards // tp_size
        cuts = {"q": (tp, tp_size), "k": (kv_shard, kv_shards), "v": (kv_shard, kv_shards)}
        names = {side: f"self_attn.{side}_proj.weight" for side in "qkvo"}
        qkv = [rows_of(names[side], shapes[names[side]][0], *cuts[side]) for side in "qkv"]
        own = self.dialect.attention
        yield stack(f"{own}qkv_proj.weight", qkv, model.hidden_size)
        output = names["o"]
        yield columns_of(f"{own}o_proj.weight", output, shapes[output], tp, tp_size)
        for side in ("q", "k") if model.has_qk_norm else ():
            norm = f"self_attn.{side}_norm.weight"
            yield whole(f"{own}{side}_norm.weight", norm, shapes[norm])

    def _mlp(self, own: str, hf: str, shapes: Shapes) -> Iterator[Piece]:
        tp, tp_size, down = self.tp, self.tp_size, f"{hf}.down_proj.weight"
        rows = gated_rows(hf, shapes, tp, tp_size)
        yield stack(f"{own}gate_up_proj.weight", rows, self.model.hidden_size)
        yield columns_of(f"{own}down_proj.weight", down, shapes[down], tp, tp_size)

    def _experts(self, moe: MoeConfig, shapes: Shapes) -> Iterator[Piece]:
        own = self.dialect.mlp
        yield whole(f"{own}gate.weight", ROUTER, shapes[ROUTER])
        if moe.has_expert_bias:
            bias = f"{own}gate.e_score_correction_bias"
            yield whole(bias, EXPERT_BIAS, shapes[EXPERT_BIAS], "fp32")
        ranks_per_expert = self.tp_size // self.ep_size
        group, part = divmod(self.tp, ranks_per_expert)
        num_local = moe.num_experts // self.ep_size
        local = [expert(number) for number in range(group * num_local, (group + 1) * num_local)]
        width = moe.moe_intermediate_size // ranks_per_expert
        yield _stacked_gate_up(f"{own}experts.w13_weight", local, width, part, self.model)
        yield _stacked_down(f"{own}experts.w2_weight", local, width, part, self.model)


def _stacked_gate_up(
    storage: str, experts: list[str], width: int, part: int, model: ModelConfig
) -> Piece:
    """Rows ``[part * width, + width)`` of gate above those of up, one expert behind the other."""
    hidden = model.hidden_size
    box = Box((part * width, 0), ((part + 1) * width, hidden))
    tiles = [
        Tile(f"{name}.{side}_proj.weight", box, storage, (local, row, 0))
        for local, name in enumerate(experts)
        for side, row in (("gate", 0), ("up", width))
    ]
    return Storage(storage, (len(experts), 2 * width, hidden)), tuple(tiles)


def _stacked_down(
    storage: str, experts: list[str], width: int, part: int, model: ModelConfig
) -> Piece:
    """Columns ``[part * width, + width)`` of down, one expert behind the other."""
    hidden = model.hidden_size
    box = Box((0, part * width), (hidden, (part + 1) * width))
    tiles = [
        Tile(f"{name}.down_proj.weight", box, storage, (local, 0, 0))
        for local, name in enumerate(experts)
    ]
    return Storage(storage, (len(experts), hidden, width)), tuple(tiles)


def _problems(model: ModelConfig, tp_size: int, ep_size: int, dialect: _Dialect) -> list[str]:
    problems = [*attention_problems(model, tp_size, "engine tp_size")]
    rows = dialect.padded_vocab_size(model.vocab_size)
    name = "vocab_size" if rows == model.vocab_size else "padded vocab_size"
    problems += divides(name, rows, tp_size, "engine tp_size")
    if model.moe is None and ep_size > 1:
        problems.append(
            f"engine ep_size {ep_size} spreads experts and the model has none; set it to 1"
        )
    if tp_size % ep_size:
        problems.append(
            f"engine ep_size {ep_size} does not divide engine tp_size {tp_size}; the ranks with "
            "different experts are those of one tensor-parallel group"
        )
        ep_size = 1
    asked_by = ("engine tp_size", "engine tp_size / ep_size")
    problems += mlp_problems(model, tp_size, tp_size // ep_size, asked_by)
    if model.moe is not None:
        problems += divides("num_experts", model.moe.num_experts, ep_size, "engine ep_size")
    return problems
