"""Real Megatron GPT models, filled with element ids, and Megatron's own word on where each lies.

The oracle is ``sharded_state_dict``: for every tensor it states a global name, a global shape and
an offset. What those global tensors are made of is written down here once more, element by element
and without the package's layouts. Only ranks import Megatron, so collecting stays fast.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig, TrainerConfig
from npr_megatron.weights.names import canonical_parameters


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how it is laid out."""

    name: str
    model: ModelConfig
    parallel: ParallelConfig


def padded_vocab_size(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Return the embedding rows over all TP ranks."""
    step = parallel.vocab_divisor * parallel.tp_size
    return -(-model.vocab_size // step) * step


def build_chunks(model: ModelConfig, parallel: ParallelConfig) -> list[Any]:
    """Return this rank's model chunks; its process groups must have been built."""
    from megatron.core import parallel_state

    from npr_megatron.model.gpt import BranchGPT
    from npr_megatron.model.spec import block_spec
    from npr_megatron.model.transformer_config import transformer_config

    config = transformer_config(model, parallel, TrainerConfig())
    chunks: list[Any] = []
    for chunk in range(parallel.vpp_size):
        virtual = {"vp_stage": chunk if parallel.vpp_size > 1 else None}
        place = {"ignore_virtual": False, **virtual}
        chunks.append(
            BranchGPT(
                model,
                parallel,
                config,
                transformer_layer_spec=block_spec(config, virtual["vp_stage"]),
                pre_process=parallel_state.is_pipeline_first_stage(**place),
                post_process=parallel_state.is_pipeline_last_stage(**place),
                **virtual,
            )
        )
    return chunks


def element_ids(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Return canonical tensors in which every element is a number of its own, exact in fp32."""
    first = 1
    tensors: dict[str, torch.Tensor] = {}
    for parameter in canonical_parameters(model):
        count = int(np.prod(parameter.shape))
        ids = torch.arange(first, first + count, dtype=torch.float32)
        tensors[parameter.name] = ids.view(parameter.shape)
        first += count
    assert first < 2**24
    return tensors


def disagreements(
    chunks: list[Any], case: Case, ids: dict[str, torch.Tensor]
) -> tuple[list[str], int]:
    """Compare live tensors with Megatron's word; return what differs and the elements compared."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    expected = global_tensors(case, {name: tensor.numpy() for name, tensor in ids.items()})
    problems: list[str] = []
    num_elements = 0
    for entry in itertools.chain.from_iterable(c.sharded_state_dict().values() for c in chunks):
        if entry.key.endswith("_extra_state"):
            continue
        for shard in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
            assert isinstance(shard, ShardedTensor)
            num_elements += shard.data.numel()
            whole = expected[shard.key]
            if whole.shape != shard.global_shape:
                problems.append(f"{shard.key}: {whole.shape} is not {shard.global_shape}")
                continue
            lead = (1,) * shard.prepend_axis_num
            spans = zip(shard.global_offset, (*lead, *shard.local_shape), strict=True)
            there = whole[tuple(slice(a, a + n) for a, n in spans)]
            here = shard.data.detach().numpy().reshape(there.shape)
            if not np.array_equal(here, there):
                different = int((here != there).sum())
                problems.append(f"{shard.key} at {shard.global_offset}: {different} differ")
    return problems, num_elements


def global_tensors(case: Case, canonical: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return Megatron's global tensors by checkpoint key."""
    model = case.model
    padding = padded_vocab_size(model, case.parallel) - model.vocab_size
    head = "model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight"
    tensors = {
        key: np.pad(canonical[name], ((0, padding), (0, 0)))
        for key, name in (
            ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
            ("output_layer.weight", head),
        )
    }
    tensors["decoder.final_layernorm.weight"] = canonical["model.norm.weight"]
    layers = [_layer_tensors(model, n, canonical) for n in range(model.num_hidden_layers)]
    if model.moe is None:
        # All layers alike: one tensor with an axis over them.
        for key in layers[0]:
            tensors[f"decoder.layers.{key}"] = np.stack([layer[key] for layer in layers])
    else:
        for number, layer in enumerate(layers):
            tensors |= {f"decoder.layers.{number}.{key}": value for key, value in layer.items()}
    return tensors


def _layer_tensors(
    model: ModelConfig, number: int, canonical: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    prefix = f"model.layers.{number}."
    own = {name[len(prefix) :]: t for name, t in canonical.items() if name.startswith(prefix)}
    tensors = {
        "self_attention.linear_qkv.layer_norm_weight": own["input_layernorm.weight"],
        "self_attention.linear_qkv.weight": _fused_qkv(model, own),
        "self_attention.linear_proj.weight": own["self_attn.o_proj.weight"],
        "mlp.linear_fc1.layer_norm_weight": own["post_attention_layernorm.weight"],
    }
    if model.has_qk_norm:
        for side in ("q", "k"):
            tensors[f"self_attention.{side}_layernorm.weight"] = own[
                f"self_attn.{side}_norm.weight"
            ]
    if model.moe is None or number < model.moe.num_dense_layers:
        return tensors | _gated("mlp", own, ["mlp"], stacked=False)
    tensors["mlp.router.weight"] = own["mlp.gate.weight"]
    if model.moe.has_expert_bias:
        tensors["mlp.router.expert_bias"] = own["mlp.gate.e_score_correction_bias"]
    experts = [f"mlp.experts.{expert}" for expert in range(model.moe.num_experts)]
    tensors |= _gated("mlp.experts.experts", own, experts, stacked=True)
    if model.moe.shared_intermediate_size:
        tensors |= _gated("mlp.shared_experts", own, ["mlp.shared_experts"], stacked=False)
    return tensors


def _fused_qkv(model: ModelConfig, own: dict[str, np.ndarray]) -> np.ndarray:
    """Row by row, from the closed form."""
    d, groups = model.head_dim, model.num_key_value_heads
    r = model.num_attention_heads // groups
    fused = np.full((groups * (r + 2) * d, model.hidden_size), -1, np.float32)
    for row, values in enumerate(own["self_attn.q_proj.weight"]):
        head, inside = divmod(row, d)
        fused[(head // r * (r + 2) + head % r) * d + inside] = values
    for slot, side in ((r, "k"), (r + 1, "v")):
        for row, values in enumerate(own[f"self_attn.{side}_proj.weight"]):
            head, inside = divmod(row, d)
            fused[(head * (r + 2) + slot) * d + inside] = values
    return fused


def _gated(
    key: str, own: dict[str, np.ndarray], names: list[str], *, stacked: bool
) -> dict[str, np.ndarray]:
    fc1 = [
        np.concatenate([own[f"{name}.gate_proj.weight"], own[f"{name}.up_proj.weight"]])
        for name in names
    ]
    fc2 = [own[f"{name}.down_proj.weight"] for name in names]
    return {
        f"{key}.linear_fc1.weight": np.stack(fc1) if stacked else fc1[0],
        f"{key}.linear_fc2.weight": np.stack(fc2) if stacked else fc2[0],
    }
