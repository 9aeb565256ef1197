"""The Qwen3 decoder of the engine: live weight storages, the KV cache, one forward over a ragged
batch.

Tokens of all requests lie one after another in a flat [T] batch; only attention knows which belongs
to which (``engine.attention``). Storages are fused and named as ``weights.layouts.engine_layout``
cuts them, and are written in place for the whole life of the engine, so a view taken once stays
valid. RMS norms, rotary angles and the final log-softmax are computed in fp32, the rest in the
dtype of the storages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from npr_megatron.config.model import ModelConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, queries [T, N, D], keys [T, K, D], values [T, K, D]) -> [T, N * D]."""


class _Layer(NamedTuple):
    input_norm: Tensor
    qkv: Tensor
    attention_out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


def storage_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every storage of an engine (one tensor-parallel rank)."""
    hidden, head, ffn = model.hidden_size, model.head_dim, model.intermediate_size
    num_q, num_kv = model.num_attention_heads, model.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (model.vocab_size, hidden)}
    for layer in range(model.num_hidden_layers):
        prefix = f"layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "qkv_proj.weight": ((num_q + 2 * num_kv) * head, hidden),
            prefix + "q_norm.weight": (head,),
            prefix + "k_norm.weight": (head,),
            prefix + "o_proj.weight": (hidden, num_q * head),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "gate_up_proj.weight": (2 * ffn, hidden),
            prefix + "down_proj.weight": (hidden, ffn),
        }
    shapes["norm.weight"] = (hidden,)
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    return shapes


class EngineModel:
    """Weights, KV cache and forward pass.

    Args:
        num_slots: KV slots besides the dummy slot 0.
    """

    def __init__(
        self, model: ModelConfig, *, num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = model
        self.device = device
        self.weights: dict[str, Tensor] = {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, shape in storage_shapes(model).items()
        }
        """Live storages; written in place only."""
        kv_shape = (num_slots + 1, 2 * model.num_key_value_heads, model.head_dim)
        self.kv_cache: list[Tensor] = [
            torch.zeros(kv_shape, dtype=dtype, device=device)
            for _ in range(model.num_hidden_layers)
        ]
        """Per layer [slots + 1, 2 K, D]: K keys, then K values, so one gather reads both."""
        self._layers = [self._bind(layer) for layer in range(model.num_hidden_layers)]
        self._head_norms = self._fuse_head_norms()
        num_heads = (model.num_attention_heads, model.num_key_value_heads)
        self._norm_of_head = torch.arange(2, device=device).repeat_interleave(
            torch.tensor(num_heads, device=device)
        )
        self._head = self.weights[
            "embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight"
        ]
        self._cos, self._signed_sin = _rotary_tables(model, dtype, device)

    def hidden(self, token_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """Return [T, H] normalised hidden states of a flat batch.

        Args:
            token_ids: [T] int.
            position_ids: [T] int logical positions.
            attend: attention over this batch and whatever it stands for in the cache.
        """
        config = self.config
        eps, width = config.rms_norm_eps, (config.hidden_size,)
        hidden = F.embedding(token_ids, self.weights["embed_tokens.weight"])
        head_norms = self._head_norms.index_select(1, self._norm_of_head)
        cos = self._cos.index_select(0, position_ids)
        sin = self._signed_sin.index_select(0, position_ids)
        for index, layer in enumerate(self._layers):
            normed = F.rms_norm(hidden, width, layer.input_norm, eps)
            queries, keys, values = self._project(layer.qkv, head_norms[index], normed, cos, sin)
            hidden = hidden + F.linear(attend(index, queries, keys, values), layer.attention_out)
            normed = F.rms_norm(hidden, width, layer.post_norm, eps)
            gate, up = F.linear(normed, layer.gate_up).chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate).mul_(up), layer.down)
        return F.rms_norm(hidden, width, self.weights["norm.weight"], eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return [M, V] fp32 logits of [M, H] hidden states."""
        return F.linear(hidden, self._head).float()

    def _project(
        self, qkv: Tensor, head_norms: Tensor, normed: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values; queries and keys are normalised and rotated together."""
        config = self.config
        num_q, num_kv, head = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        heads = F.linear(normed, qkv).view(-1, num_q + 2 * num_kv, head)
        rotated = F.rms_norm(heads[:, : num_q + num_kv], (head,), None, config.rms_norm_eps)
        rotated = _rotate(rotated * head_norms, cos, sin)
        return rotated[:, :num_q], rotated[:, num_q:], heads[:, num_q + num_kv :]

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
        names = (
            "input_layernorm",
            "qkv_proj",
            "o_proj",
            "post_attention_layernorm",
            "gate_up_proj",
            "down_proj",
        )
        return _Layer(*(self.weights[f"layers.{layer}.{name}.weight"] for name in names))


def _rotate(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotate [T, heads, D] by the HF convention: the two halves of D are the pair.

    ``rotate_half(x) * sin`` equals ``roll(x, D / 2) * (sin with its first half negated)``: one
    kernel less.
    """
    rolled = torch.roll(heads, heads.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads * cos, rolled, signed_sin)


def _rotary_tables(
    model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin, each [max positions, 1, D]; angles are computed in fp32."""
    half = torch.arange(0, model.head_dim, 2, dtype=torch.float32, device=device) / model.head_dim
    frequencies = 1.0 / model.rope_theta**half
    positions = torch.arange(model.max_position_embeddings, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
    signed_sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
    return cos[:, None].to(dtype), signed_sin[:, None].to(dtype)
