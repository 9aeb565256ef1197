"""Attention of a flat batch, in two forms behind one call: over the KV pool, or over the batch
itself.

``PooledAttention`` first writes the keys and values of every token of the batch into their slots,
then lets each group of query rows read its own list of slots. Writing comes first, so a token may
be read by another row of the same batch: a fork feeds the trunk's last tokens and the branches'
headers at once, a join feeds the last branch's end and the takeaway at once.

``DenseAttention`` serves scoring: whole trajectories, padded, under an explicit mask, touching no
slot.

On a CPU in fp32 ``host_attention`` does what ``PooledAttention`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from npr_megatron.engine.compute.device_batch import DeviceGroup
from npr_megatron.engine.compute.two_level import attend_two_levels


class PooledAttention:
    """Writes a batch into the pool, then reads each group's slots.

    Args:
        kv_cache: per layer [slots + 1, 2 K, D]; the listed slots are overwritten.
        slots: [T] slot of every token of the batch, all distinct.
        groups: partition of 0..T into consecutive ranges, in order.
    """

    def __init__(
        self, kv_cache: Sequence[Tensor], slots: Tensor, groups: Sequence[DeviceGroup]
    ) -> None:
        self._kv_cache = kv_cache
        self._slots = slots
        self._groups = [Reading.of(group, kv_cache[0].dtype) for group in groups]

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        cache = self._kv_cache[layer]
        queries, keys_values = split_heads(heads, cache.shape[1])
        cache.index_copy_(0, self._slots, keys_values)
        if len(self._groups) == 1:
            return attend_group(self._groups[0], queries, cache)
        return torch.cat(
            [attend_group(group, queries[group.tokens], cache) for group in self._groups]
        )


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A group, prepared once for all layers."""

    tokens: slice
    shape: tuple[int, int]
    """Rows B, and own slots S per row."""
    own: Tensor
    """[B * S] slots each row reads for itself."""
    shared: Tensor | None
    """[P] slots read once for all rows."""
    bias: Tensor
    """Added to the scores of own slots, to hide some."""
    padded: Tensor | None
    kept: Tensor | None

    @classmethod
    def of(cls, group: DeviceGroup, dtype: torch.dtype) -> Reading:
        own, visible = group.keys, group.visible
        if group.num_shared:
            own = own[:, group.num_shared :]
            visible = visible[..., group.num_shared :]
        bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        bias.masked_fill_(~visible, -torch.inf)
        return cls(
            tokens=slice(group.start, group.start + group.count),
            shape=(own.shape[0], own.shape[1]),
            own=own.reshape(-1),
            shared=group.keys[0, : group.num_shared] if group.num_shared else None,
            bias=bias,
            padded=group.padded,
            kept=group.kept,
        )


def attend_group(group: Reading, queries: Tensor, cache: Tensor) -> Tensor:
    """Return [tokens, N * D] of the [tokens, N, D] queries of a group."""
    if group.padded is not None:
        queries = queries.index_select(0, group.padded)
    num_tokens, num_q, head = queries.shape
    num_kv = cache.shape[1] // 2
    read = cache.index_select(0, group.own).view(*group.shape, 2 * num_kv, head)
    if num_tokens == group.shape[0]:
        # One query per row: query heads that share a key head become queries of it, none repeats.
        folded = queries.reshape(num_tokens, num_kv, num_q // num_kv, head)
        if group.shared is not None:
            shared = cache.index_select(0, group.shared)
            return attend_two_levels(folded, shared, read, group.bias).reshape(num_tokens, -1)
        keys, values = read.transpose(1, 2).chunk(2, dim=1)
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=group.bias)
        return out.reshape(num_tokens, num_q * head)
    keys, values = read.transpose(1, 2).chunk(2, dim=1)
    runs = queries.unflatten(0, (group.shape[0], -1)).transpose(1, 2)
    flat = _attend_runs(runs, keys, values, group.bias)
    return flat if group.kept is None else flat.index_select(0, group.kept)


def split_heads(heads: Tensor, num_stored: int) -> tuple[Tensor, Tensor]:
    """Return the queries and, the last ``num_stored``, the keys and values: views."""
    num_q = heads.shape[1] - num_stored
    return heads[:, :num_q], heads[:, num_q:]


class DenseAttention:
    """Attends inside B padded rows of S tokens under a mask; reads and writes no cache.

    Args:
        visible: [B, 1, S, S] bool, query by key; every query sees at least itself.
        num_kv: key heads K.
    """

    def __init__(self, visible: Tensor, num_kv: int) -> None:
        self._visible = visible
        self._num_kv = num_kv

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        queries, keys_values = split_heads(heads, 2 * self._num_kv)
        rows = (self._visible.shape[0], self._visible.shape[2])
        keys, values = keys_values.unflatten(0, rows).transpose(1, 2).chunk(2, dim=1)
        runs = queries.unflatten(0, rows).transpose(1, 2)
        return _attend_runs(runs, keys, values, self._visible)


def _attend_runs(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return [B * S, N * D] of queries [B, N, S, D] over keys and values [B, K, L, D].

    Under a mask and with shared heads CUDA has but the backend that spells all scores out, so there
    every query head gets a copy of its keys: for runs that is little against their scores.
    FlexAttention would save the mask, some MiB a pass, and want a block mask made for every batch
    and a compilation per shape; replays are too few to pay for that.
    """
    group = queries.shape[1] // keys.shape[1]
    if queries.is_cuda and group > 1:
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, enable_gqa=queries.shape[1] != keys.shape[1]
    )
    return out.transpose(1, 2).flatten(2).flatten(0, 1)
