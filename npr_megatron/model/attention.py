"""Core attention of the NPR GPT: rotary positions and branch visibility from one object.

:class:`BranchContext` is built once per microbatch and handed to every layer as Megatron's
``packed_seq_params``. (``attention_mask`` is no road for it: full recompute saves that argument for
backward and takes tensors only.) The core attention rotates queries and keys by the context's
angles, then attends where it says, in the form in which it says so: on CUDA by FlexAttention with a
block mask, on CPU by segments, and by SDPA with a dense mask where rows are short. Only that one
takes memory that grows with the square of the tokens; it is the oracle for the others.

Megatron's own rotary embedding is switched off: it numbers tokens 0, 1, 2, ... and ignores
position ids, and it takes the cosine of all angles anew in each layer.

The CUDA branch could not be executed where this was written, beyond the block mask and the eager
forward pass (equal to SDPA on CPU); run ``pytest -m gpu`` on a machine with CUDA before relying on
its compiled backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from npr_megatron.config.model import ModelConfig
from npr_megatron.model.segment_attention import segment_attention, segments_pay
from npr_megatron.records.sample import PackedBatch
from npr_megatron.topology.attention_plan import AttentionPlan, attention_plan
from npr_megatron.topology.context_slices import gathered_columns, own_columns, own_slices
from npr_megatron.topology.rotary import inverse_frequencies
from npr_megatron.topology.visibility import dense_mask, visible

Visibility = AttentionPlan | BlockMask | Tensor
"""A plan of segments, a block mask, or [B, 1, S, S] to add to the scores: 0 where visible, -inf
elsewhere."""


@dataclass
class BranchContext(PackedSeqParams):
    """What core attention needs to know about one microbatch of B rows of S tokens."""

    qkv_format: str = "sbhd"
    rotary_cos: Tensor | None = None
    """[S, B, 1, D] cosine of the angle of each token and channel, in the compute dtype."""
    rotary_sin: Tensor | None = None
    """[S, B, 1, D] sine; the first half is negated, so that rotating needs no further sign."""
    visibility: Visibility | None = None
    """Who sees whom.

    Under context parallelism S are this rank's tokens everywhere but in the last dimension of a
    mask: keys and values are gathered over ``cp_group``. Masks have them in the order of its ranks,
    a plan in the order of the row.
    """


def branch_context(
    batch: PackedBatch,
    own: PackedBatch,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    cp_group: ProcessGroup,
) -> BranchContext:
    """Return the context of ``batch``, ready for every layer of every pipeline stage.

    Args:
        own: the tokens of ``batch`` that this rank holds among ``cp_group``.
    """
    cos, sin = rotary_tables(own, model, dtype, device)
    visibility = _visibility(batch, model, dtype, device, cp_group.rank(), cp_group.size())
    context = BranchContext(rotary_cos=cos, rotary_sin=sin, visibility=visibility)
    if cp_group.size() > 1:
        context.cp_group = cp_group
    return context


def _visibility(
    batch: PackedBatch,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    cp_rank: int,
    cp_size: int,
) -> Visibility:
    """Return who sees whom, in the form that this device attends by fastest."""
    rows, length = batch.shape
    if device.type == "cpu":
        slices = own_slices(length, cp_rank, cp_size)
        plan = attention_plan(batch.segment, batch.block, batch.branch, slices)
        num_cells = rows * length * length // cp_size
        if segments_pay(plan, num_cells, model.num_attention_heads * model.head_dim):
            return plan
    queries, keys = (
        torch.from_numpy(columns).to(device)
        for columns in (own_columns(length, cp_rank, cp_size), gathered_columns(length, cp_size))
    )
    segment, block, branch = (
        torch.from_numpy(stream).to(device) for stream in (batch.segment, batch.block, batch.branch)
    )
    if device.type == "cuda":
        return block_mask(segment, block, branch, queries, keys)
    mask = dense_mask(segment, block, branch)
    if cp_size > 1:
        mask = mask[:, queries][..., keys]
    return score_bias(mask, dtype)


def score_bias(mask_BSS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [B, 1, S, S] for SDPA: 0 where ``mask_BSS`` is True, -inf elsewhere.

    SDPA makes the same of a bool mask, but in each layer, and keeps it for backward.
    """
    bias = torch.zeros(mask_BSS.shape, dtype=dtype, device=mask_BSS.device)
    return bias.masked_fill_(~mask_BSS, -torch.inf).unsqueeze(1)


def rotary_tables(
    batch: PackedBatch, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosine and signed sine [S, B, 1, D] of the angles at ``batch.position_ids``.

    Angles are computed in fp32 whatever the compute dtype: bf16 cannot tell position 257 from 258.
    """
    frequencies = torch.from_numpy(inverse_frequencies(model)).to(device)
    positions_SB = torch.from_numpy(batch.position_ids).to(device, torch.float32).t()
    angles = positions_SB[:, :, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def _rotate(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Return ``heads`` [S, B, N, D] turned by its angle in each plane (d, d + D/2)."""
    low, high = heads.chunk(2, -1)
    return torch.addcmul(heads * cos, torch.cat((high, low), -1), signed_sin)


def block_mask(
    segment_BS: Tensor, block_BS: Tensor, branch_BS: Tensor, queries: Tensor, keys: Tensor
) -> BlockMask:
    """Return the block-sparse form of ``topology.visibility.dense_mask[:, queries][..., keys]``.

    Args:
        queries: offsets in the row of the tokens that look.
        keys: offsets of those that are looked at, in the order in which they lie.
    """

    def is_visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query, key = queries[query], keys[key]
        segment = segment_BS[row, query]
        sees = visible(
            block_BS[row, query], branch_BS[row, query], block_BS[row, key], branch_BS[row, key]
        )
        same_sample = (segment == segment_BS[row, key]) & (segment >= 0)
        return (query == key) | ((query >= key) & same_sample & sees)

    # Compiled, it never writes the [S, S] mask down that it summarises.
    create = torch.compile(create_block_mask)
    rows = segment_BS.shape[0]
    return create(is_visible, rows, None, len(queries), len(keys), segment_BS.device)


def row_order(gathered: Tensor, cp_size: int) -> Tensor:
    """Return keys [S, ...] gathered from ranks (``context_slices.gathered_columns``) as they stand
    in the row: the early slice of each rank in order, then the late ones from last to first."""
    slices = gathered.chunk(2 * cp_size)
    return torch.cat((*slices[::2], *slices[::-2]))


@cache
def _compiled_flex_attention() -> Any:
    """FlexAttention for CUDA: its CPU kernel has no backward."""
    return torch.compile(flex_attention)


class BranchCore(MegatronModule):
    """Core attention between tokens that see one another; has no parameters."""

    def __init__(
        self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 0)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing of it goes into a checkpoint."""
        return {}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: BranchContext,
        **_: Any,
    ) -> Tensor:
        """Return the attended values.

        Args:
            query: [S, B, N/tp, D], normed, not yet rotated.
            key: [S, B, K/tp, D], as ``query``.
            value: [S, B, K/tp, D].
            attention_mask: unused; visibility is in ``packed_seq_params``.
            packed_seq_params: the context of this microbatch.

        Returns:
            [S, B, N/tp * D].
        """
        context = packed_seq_params
        assert context.rotary_cos is not None and context.rotary_sin is not None
        query = _rotate(query, context.rotary_cos, context.rotary_sin)
        key = _rotate(key, context.rotary_cos, context.rotary_sin)
        if context.cp_group is not None:
            # Backward sums the gradients of a key over all ranks whose queries looked at it.
            gathered = gather_from_sequence_parallel_region(
                torch.cat((key, value), -1),
                tensor_parallel_output_grad=True,
                group=context.cp_group,
            )
            if isinstance(context.visibility, AttentionPlan):
                gathered = row_order(gathered, context.cp_group.size())
            key, value = gathered.chunk(2, -1)
        q, k, v = (heads.permute(1, 2, 0, 3) for heads in (query, key, value))
        attended = self._attend(q, k, v, context.visibility)
        return attended.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility | None) -> Tensor:
        """Return [B, N, S, D] for ``q`` [B, N, S, D] and ``k``, ``v`` [B, K, S, D]."""
        match visibility:
            case AttentionPlan():
                return segment_attention(q, k, v, visibility, self.scale)
            case BlockMask():
                return _compiled_flex_attention()(
                    q, k, v, block_mask=visibility, scale=self.scale, enable_gqa=True
                )
            case _:
                return F.scaled_dot_product_attention(
                    q, k, v, attn_mask=visibility, scale=self.scale, enable_gqa=True
                )
