"""The decoder of the engine (Qwen3, Qwen3-MoE, Llama): live weight storages, the KV cache, one
forward over a ragged batch.

Tokens of all requests lie one after another in a flat [T] batch; only attention knows which belongs
to which (``compute.attention``). Storages are fused and named as ``weights.layouts.engine_layout``
cuts them, and are written in place for the whole life of the engine, so a view taken once stays
valid. RMS norms, rotary angles and the final log-softmax are computed in fp32, the rest in the
dtype of the storages.

Over several ranks each holds some heads, some channels of the MLP or of every expert, and some rows
of the vocabulary; partial results are added after attention and after the MLP, and logits are laid
side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.compute.dense import dense_product
from npr_megatron.engine.compute.experts import Experts, check_computable
from npr_megatron.engine.compute.kernels import kernels_for
from npr_megatron.engine.compute.quantised import Weight, linear, weight_of
from npr_megatron.engine.compute.ranks import Ranks
from npr_megatron.engine.compute.routes import Record
from npr_megatron.topology.rotary import inverse_frequencies
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.layouts.served import Quantisation, quantised_layout
from npr_megatron.weights.names import experts_of
from npr_megatron.weights.storages import empty_storages
from npr_megatron.weights.tiles import Layout

WeightFormat = Literal["as_trained", "fp8"]
"""Of the matrices of the layers: the dtype of the rest, or e4m3 with one scale per block."""
Attend = Callable[[int, Tensor], Tensor]
"""(layer, [T, N + 2 K, D] queries, keys and values) -> [T, N * D]."""


class _Mlp(NamedTuple):
    gate_up: Weight
    down: Weight


class _Layer(NamedTuple):
    input_norm: Tensor
    qkv: Weight
    attention_out: Weight
    post_norm: Tensor
    mlp: _Mlp | Experts


def storage_layout(
    model: ModelConfig, tp_size: int = 1, weights: WeightFormat = "as_trained"
) -> Layout:
    """Return the names, shapes and contents of the storages of an engine, rank by rank.

    Raises:
        LayoutError: the model cannot be cut so, or not into whole FP8 blocks.
    """
    layout = engine_layout(model, tp_size)
    return quantised_layout(layout, Quantisation.of(model)) if weights == "fp8" else layout


class EngineModel:
    """Weights, KV cache and forward pass of one rank.

    Args:
        num_slots: KV slots besides the dummy slot 0.
        weights: how the matrices of the layers are kept.
        ranks: those the model is cut over, all of which call ``hidden`` and ``logits`` alike; None
            for a model that is whole.

    Raises:
        InputError: the model has parts that are not computed here.
        LayoutError: the model cannot be cut so.
    """

    def __init__(
        self,
        model: ModelConfig,
        *,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        weights: WeightFormat = "as_trained",
        ranks: Ranks | None = None,
    ) -> None:
        check_computable(model)
        self.config = model
        self.device = device
        self._ranks = ranks
        rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        self.num_q = model.num_attention_heads // size
        """Query heads of this rank."""
        self.num_kv = max(1, model.num_key_value_heads // size)
        """Key heads of this rank, each with its values."""
        self.weights: dict[str, Tensor] = empty_storages(
            storage_layout(model, size, weights).ranks[rank], dtype, device
        )
        """Live storages; written in place only."""
        kv_shape = (num_slots + 1, 2 * self.num_kv, model.head_dim)
        self.kv_cache: list[Tensor] = [
            torch.zeros(kv_shape, dtype=dtype, device=device)
            for _ in range(model.num_hidden_layers)
        ]
        """Per layer [slots + 1, 2 K, D]: K keys, then K values, so one gather reads both."""
        self._kernels = kernels_for(device, dtype, (self.num_q, self.num_kv), model.rms_norm_eps)
        self._layers = [self._bind(layer) for layer in range(model.num_hidden_layers)]
        self._head_norms = self._fuse_head_norms() if model.has_qk_norm else None
        self._head = self.weights[
            "embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight"
        ]
        self._cos, self._signed_sin = _rotary_tables(model, dtype, device)

    @property
    def asks_the_host(self) -> bool:
        """Whether a pass has to wait for the device, because work is shared out on the host."""
        mlps = [layer.mlp for layer in self._layers]
        return any(isinstance(mlp, Experts) and not mlp.is_grouped for mlp in mlps)

    def hidden(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        attend: Attend,
        record: Record | None = None,
    ) -> Tensor:
        """Return [T, H] normalised hidden states of a flat batch.

        Args:
            token_ids: [T] int.
            position_ids: [T] int logical positions.
            attend: attention over this batch and whatever it stands for in the cache.
            record: is told which experts compute the batch.
        """
        kernels = self._kernels
        hidden = self._embed(token_ids)
        head_norms = self._spread_head_norms()
        cos = self._cos.index_select(0, position_ids)
        signed_sin = self._signed_sin.index_select(0, position_ids)
        num_heads, size = self.num_q + 2 * self.num_kv, self.config.head_dim
        for index, layer in enumerate(self._layers):
            normed = kernels.norm(hidden, layer.input_norm)
            heads = linear(normed, layer.qkv).view(-1, num_heads, size)
            kernels.turn(heads, head_norms[index], cos, signed_sin)
            hidden = hidden + self._sum(linear(attend(index, heads), layer.attention_out))
            normed = kernels.norm(hidden, layer.post_norm)
            if isinstance(layer.mlp, Experts):
                computed = self._route(index, layer.mlp, normed, record)
            else:
                computed = linear(kernels.gate(linear(normed, layer.mlp.gate_up)), layer.mlp.down)
            hidden = hidden + self._sum(computed)
        return kernels.norm(hidden, self.weights["norm.weight"])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [M, V] fp32 logits of [M, H] hidden states."""
        logits = dense_product(hidden, self._head)
        if self._ranks is not None:
            logits = self._ranks.join_columns(logits)
        return logits.float()

    def _embed(self, token_ids: Tensor) -> Tensor:
        table = self.weights["embed_tokens.weight"]
        if self._ranks is None:
            return F.embedding(token_ids, table)
        own = token_ids - self._ranks.rank * len(table)
        is_elsewhere = (own < 0) | (own >= len(table))
        rows = F.embedding(own.masked_fill(is_elsewhere, 0), table)
        return self._ranks.sum(rows.masked_fill_(is_elsewhere[:, None], 0.0))

    def _sum(self, partial: Tensor) -> Tensor:
        """Return the result of a matrix whose columns are spread over the ranks."""
        return partial if self._ranks is None else self._ranks.sum(partial)

    def _route(self, layer: int, experts: Experts, hidden: Tensor, record: Record | None) -> Tensor:
        """Return what the experts of ``layer`` make of ``hidden`` [T, H]."""
        shares, chosen = experts.route(hidden)
        if record is not None:
            assert self.config.moe is not None
            record(layer - self.config.moe.num_dense_layers, chosen)
        return experts.compute(hidden, shares, chosen)

    def _spread_head_norms(self) -> Sequence[Tensor | None]:
        """Return per layer what the kernels take for the norms of heads."""
        if self._head_norms is None:
            return [None] * len(self._layers)
        return self._kernels.head_norms(self._head_norms)

    def _fuse_head_norms(self) -> Tensor:
        """Lay query and key norms of all layers side by side, [layers, 2, D], as live storages."""
        config = self.config
        names = [
            (f"layers.{layer}.q_norm.weight", f"layers.{layer}.k_norm.weight")
            for layer in range(config.num_hidden_layers)
        ]
        fused = torch.stack([torch.stack([self.weights[n] for n in pair]) for pair in names])
        for layer, pair in enumerate(names):
            for kind, name in enumerate(pair):
                self.weights[name] = fused[layer, kind]
        return fused

    def _bind(self, layer: int) -> _Layer:
        def norm(name: str) -> Tensor:
            return self.weights[f"layers.{layer}.{name}_layernorm.weight"]

        def matrix(name: str) -> Weight:
            return weight_of(f"layers.{layer}.{name}_proj.weight", self.weights)

        moe = experts_of(self.config, layer)
        if moe is None:
            mlp = _Mlp(matrix("gate_up"), matrix("down"))
        else:
            mlp = Experts(self.weights, f"layers.{layer}.", moe, self._kernels)
        return _Layer(
            input_norm=norm("input"),
            qkv=matrix("qkv"),
            attention_out=matrix("o"),
            post_norm=norm("post_attention"),
            mlp=mlp,
        )


def _rotary_tables(
    model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin, each [max positions, 1, D]; angles are computed in fp32."""
    frequencies = torch.from_numpy(inverse_frequencies(model)).to(device)
    positions = torch.arange(model.max_position_embeddings, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
    signed_sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
    return cos[:, None].to(dtype), signed_sin[:, None].to(dtype)
