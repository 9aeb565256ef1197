"""Random models with a way to hold them in a trainer and in an engine: what layouts are tested on.

Ten kinds of topology, each with features it always has. Drawn equally often they meet these shares
whatever else chance adds: trainer TP above the kv heads 30 %, engine TP above them 30 %, pipelines
that are interleaved, uneven or described by a string 60 %, experts 30 %. Sizes are tiny: a topology
is made, cut and compared in milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from hypothesis import strategies as st

from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.layouts import EngineKind, engine_layout, trainer_layout
from npr_megatron.weights.tiles import Layout

_MOST_RANKS = 8
"""Of a trainer, where the degrees that a kind asks for do not need more."""
_MOST_IN_STAGE = 16
"""Ranks of a stage with experts, where tp and ep do not need more."""
_MOST_EXPERTS = 12
"""Degrees of 3 and 4 meet in twelve. More experts, ranks and layers cost time and show nothing new.
"""
Split = Literal["even", "interleaved", "uneven", "string"]


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
    engine_ep_size: int = 1
    engine: EngineKind = "embedded"

    @cached_property
    def source(self) -> Layout:
        """The trainer's layout."""
        return trainer_layout(self.model, self.parallel)

    @cached_property
    def target(self) -> Layout:
        """The engine's layout."""
        return engine_layout(self.model, self.engine_tp_size, self.engine_ep_size, self.engine)


@dataclass(frozen=True)
class Kind:
    """What every topology of a kind has; None leaves it to chance."""

    is_trainer_above: bool | None = None
    """Trainer TP above the number of kv heads."""
    is_engine_above: bool | None = None
    splits: tuple[Split, ...] = ("even", "interleaved", "uneven", "string")
    families: tuple[str, ...] = ("qwen3", "llama")


KINDS = {
    "dense": Kind(),
    "trainer above kv heads": Kind(is_trainer_above=True),
    "engine above kv heads": Kind(is_engine_above=True),
    "both above kv heads": Kind(is_trainer_above=True, is_engine_above=True, splits=("string",)),
    "interleaved": Kind(splits=("interleaved",)),
    "uneven": Kind(splits=("uneven",)),
    "layout string": Kind(splits=("string",)),
    "experts": Kind(families=("qwen3_moe", "glm4_moe")),
    "experts, interleaved": Kind(
        is_trainer_above=True, splits=("interleaved", "uneven"), families=("qwen3_moe",)
    ),
    "experts after dense layers": Kind(
        is_engine_above=True, splits=("string", "uneven"), families=("glm4_moe",)
    ),
}


@st.composite
def topologies(draw: st.DrawFn, kind: str | None = None) -> Topology:
    """Topologies of one of ``KINDS``, or of all: TP, PP, CP, DP, VPP, EP, ETP; engine TP and EP."""
    wanted = KINDS[kind or draw(st.sampled_from([*KINDS]))]
    family: Any = draw(st.sampled_from(wanted.families))
    has_experts = family in ("qwen3_moe", "glm4_moe")
    kv_heads, tp, engine_tp = _degrees(draw, wanted, has_experts)
    spread = _expert_degrees(draw, tp, engine_tp) if has_experts else _Spread()
    least = tp * spread.least_dp
    split = _split(draw, draw(st.sampled_from(wanted.splits)), _MOST_RANKS // least)
    replicas = draw(st.integers(1, max(1, _MOST_RANKS // (least * split["pp_size"]))))
    cp = draw(st.sampled_from([size for size in (1, 2, 3) if replicas % size == 0]))
    parallel = ParallelConfig(
        tp_size=tp,
        cp_size=cp,
        dp_size=replicas // cp * spread.least_dp,
        ep_size=spread.ep,
        etp_size=spread.etp,
        vocab_divisor=draw(st.sampled_from([1, 1, 2, 5])),
        **{key: value for key, value in split.items() if key != "num_layers"},
    )
    engine: Any = draw(st.sampled_from(["embedded", "sglang"]))
    both = math.lcm(tp, engine_tp)
    moe = _experts(draw, family, spread, both, split["num_layers"]) if has_experts else None
    model = ModelConfig(
        family=family,
        num_hidden_layers=split["num_layers"],
        hidden_size=draw(st.integers(1, 4)),
        num_attention_heads=math.lcm(both, kv_heads) * draw(st.integers(1, 2)),
        num_key_value_heads=kv_heads,
        # with more tp ranks than kv heads the fused matrix is cut inside groups and heads
        head_dim=tp // math.gcd(tp, 2 * kv_heads) * draw(st.integers(1, 2)),
        intermediate_size=both * draw(st.integers(1, 2)),
        vocab_size=_vocab_size(draw, engine, engine_tp),
        tie_word_embeddings=draw(st.booleans()),
        has_qk_norm=family.startswith("qwen3") or (family == "glm4_moe" and draw(st.booleans())),
        moe=moe,
    )
    return Topology(model, parallel, engine_tp, spread.engine_ep, engine)


def _degrees(draw: st.DrawFn, kind: Kind, has_experts: bool) -> tuple[int, int, int]:
    """Number of kv heads, trainer TP and engine TP: each divides the first or is a multiple."""
    is_above = kind.is_trainer_above or kind.is_engine_above
    kv_heads = draw(st.integers(1, 4 if is_above else 8))
    fitting = [tp for tp in range(1, 9) if kv_heads % tp == 0 or tp % kv_heads == 0]
    above = [tp for tp in fitting if tp > kv_heads]
    tp = draw(st.sampled_from(above if kind.is_trainer_above else fitting))
    # an engine that spreads experts has ranks to spread them over
    enough = [size for size in fitting if size > 1] if has_experts else fitting
    engine_tp = draw(st.sampled_from(above if kind.is_engine_above else enough or fitting))
    return kv_heads, tp, engine_tp


def _split(draw: st.DrawFn, split: Split, most_stages: int) -> dict[str, Any]:
    """Fields of ParallelConfig about the pipeline, and ``num_layers`` that fit them."""
    least = 1 if split in ("even", "string") else 2
    pp = draw(st.integers(least, max(least, min(4, most_stages))))
    if split == "even":
        return {"pp_size": pp, "num_layers": pp * draw(st.integers(1, 2))}
    if split == "interleaved":
        return _interleaved(draw, pp)
    if split == "uneven":
        return _uneven(draw, pp)
    return _layout_string(draw, pp)


def _interleaved(draw: st.DrawFn, pp: int) -> dict[str, Any]:
    vpp = draw(st.integers(2, 3))
    embedding, loss = draw(st.booleans()), draw(st.booleans())
    return {
        "pp_size": pp,
        "vpp_size": vpp,
        "account_for_embedding_in_pipeline_split": embedding,
        "account_for_loss_in_pipeline_split": loss,
        "num_layers": pp * vpp * draw(st.integers(1, 2 if pp * vpp <= 6 else 1)) - embedding - loss,
    }


def _uneven(draw: st.DrawFn, pp: int) -> dict[str, Any]:
    vpp = draw(st.sampled_from([1, 1, 2]))
    first = draw(st.integers(1, 3)) * vpp
    has_last = pp == 2 or draw(st.booleans())
    last = draw(st.integers(1, 3)) * vpp if has_last else None
    share = draw(st.integers(1, 2)) * vpp
    return {
        "pp_size": pp,
        "vpp_size": vpp,
        "num_layers_in_first_stage": first,
        "num_layers_in_last_stage": last,
        "num_layers": first + (last or 0) + share * (pp - 1 - has_last),
    }


def _layout_string(draw: st.DrawFn, pp: int) -> dict[str, Any]:
    """Chunks of any size, none included, in one of the spellings that say the same."""
    vpp = 1 if pp == 1 else draw(st.integers(1, 2))
    counts = draw(st.lists(st.integers(0, 2), min_size=pp * vpp, max_size=pp * vpp))
    counts[draw(st.integers(0, len(counts) - 1))] += 1
    is_short, comma = draw(st.booleans()), draw(st.sampled_from(["", ","]))
    chunks = [f"t*{count}" if is_short and count > 1 else "t" * count for count in counts]
    text = "E" + comma + chunks[0]
    for chunk, run in groupby(chunks[1:]):
        length = len([*run])
        text += f"(|{chunk})*{length}" if is_short else f"|{chunk}{comma}" * length
    return {
        "pp_size": pp,
        "vpp_size": vpp,
        "pipeline_layout": text + comma + "L",
        "num_layers": sum(counts),
    }


@dataclass(frozen=True)
class _Spread:
    """Degrees of a model with experts, or of one without."""

    ep: int = 1
    etp: int | None = None
    least_dp: int = 1
    """Factor of dp that makes room for ep * etp in a stage."""
    engine_ep: int = 1
    cuts: int = 1
    """An expert is cut over a divisor of this many ranks, on either side."""


def _expert_degrees(draw: st.DrawFn, tp: int, engine_tp: int) -> _Spread:
    ep = draw(st.sampled_from([2, 2, 3, 4] if tp <= 4 else [2]))
    etps = [2, 3] if tp == 1 else [None, 1, 2]
    etp = draw(st.sampled_from([e for e in etps if math.lcm(tp, ep * (e or tp)) <= _MOST_IN_STAGE]))
    cut = etp or tp
    divisors = [size for size in range(1, engine_tp + 1) if engine_tp % size == 0]
    few = [size for size in divisors if math.lcm(ep, size) <= _MOST_EXPERTS]
    engine_ep = draw(st.sampled_from(few))
    least_dp = ep * cut // math.gcd(ep * cut, tp)
    return _Spread(ep, etp, least_dp, engine_ep, math.lcm(cut, engine_tp))


def _experts(
    draw: st.DrawFn, family: str, spread: _Spread, both: int, num_layers: int
) -> MoeConfig:
    inner = spread.cuts * draw(st.integers(1, 2))
    is_glm = family == "glm4_moe"
    least = math.lcm(spread.ep, spread.engine_ep)
    return MoeConfig(
        num_experts=least * draw(st.integers(1, min(2, _MOST_EXPERTS // least))),
        num_experts_per_tok=1,
        moe_intermediate_size=inner,
        num_dense_layers=draw(st.integers(int(is_glm), max(1, num_layers - 1))),
        shared_intermediate_size=math.lcm(both, inner) if is_glm else 0,
        has_expert_bias=is_glm,
    )


def _vocab_size(draw: st.DrawFn, engine: EngineKind, engine_tp: int) -> int:
    """Rows that an engine can cut, padded or not; the trainer pads what it needs."""
    if engine == "embedded":
        return engine_tp * draw(st.integers(1, 5))
    return math.lcm(64, engine_tp) - engine_tp * draw(st.integers(0, 63 // engine_tp))
