"""Attention of a flat batch, in two forms behind one call: over the KV pool, or over the batch
itself.

``PooledAttention`` first writes the keys and values of every token of the batch into their slots,
then lets each group of query rows read its own list of slots. Writing comes first, so a token may
be read by another row of the same batch: a fork feeds the trunk's last tokens and the branches'
headers at once, a join feeds the last branch's end and the takeaway at once.

``DenseAttention`` serves scoring: whole trajectories, padded, under an explicit mask, touching no
slot.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        dtype = kv_cache[0].dtype
        self._groups = [(group, _bias(group.visible, dtype)) for group in groups]

    def __call__(self, layer: int, queries: Tensor, keys_values: Tensor) -> Tensor:
        cache = self._kv_cache[layer]
        cache.index_copy_(0, self._slots, keys_values)
        outputs = [_attend_group(group, bias, queries, cache) for group, bias in self._groups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _bias(visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return what hides keys when added to scores: made once, not in every layer."""
    if visible is None:
        return None
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, -torch.inf
    )


def _attend_group(
    group: DeviceGroup, bias: Tensor | None, queries: Tensor, cache: Tensor
) -> Tensor:
    own = queries[group.start : group.start + group.count]
    if group.padded is not None:
        own = own.index_select(0, group.padded)
    if len(own) == group.num_rows:
        return _attend_single(group, bias, own, cache)
    num_q, head = queries.shape[1:]
    num_kv = cache.shape[1] // 2
    read = cache.index_select(0, group.keys.view(-1)).view(*group.keys.shape, 2 * num_kv, head)
    keys, values = read.transpose(1, 2).chunk(2, dim=1)
    out = F.scaled_dot_product_attention(
        own.unflatten(0, (group.num_rows, -1)).transpose(1, 2),
        keys,
        values,
        attn_mask=bias,
        enable_gqa=num_q != num_kv,
    )
    flat = out.transpose(1, 2).reshape(-1, num_q * head)
    return flat if group.kept is None else flat.index_select(0, group.kept)


def _attend_single(
    group: DeviceGroup, bias: Tensor | None, queries: Tensor, cache: Tensor
) -> Tensor:
    """Return [B, N * D]: one query per row, of which some keys may be read for all rows at once."""
    num_rows, num_q, head = queries.shape
    num_kv, num_shared = cache.shape[1] // 2, group.num_shared
    # Query heads that share a key head become queries of it: no head is repeated.
    folded = queries.reshape(num_rows, num_kv, num_q // num_kv, head)
    slots = group.keys[:, num_shared:]
    read = cache.index_select(0, slots.reshape(-1)).view(*slots.shape, 2 * num_kv, head)
    if num_shared:
        shared = cache.index_select(0, group.keys[0, :num_shared])
        own_bias = None if bias is None else bias[..., num_shared:]
        out = attend_two_levels(folded, shared, read, own_bias)
    else:
        keys, values = read.transpose(1, 2).chunk(2, dim=1)
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=bias)
    return out.reshape(num_rows, num_q * head)


class DenseAttention:
    """Attends inside B padded rows of S tokens under a mask; reads and writes no cache.

    Args:
        visible: [B, 1, S, S] bool, query by key; every query sees at least itself.
    """

    def __init__(self, visible: Tensor) -> None:
        self._visible = visible

    def __call__(self, layer: int, queries: Tensor, keys_values: Tensor) -> Tensor:
        num_rows, _, length, _ = self._visible.shape
        num_q, head = queries.shape[1:]
        num_kv = keys_values.shape[1] // 2
        keys, values = (
            keys_values.unflatten(0, (num_rows, length)).transpose(1, 2).split(num_kv, dim=1)
        )
        out = F.scaled_dot_product_attention(
            queries.unflatten(0, (num_rows, length)).transpose(1, 2),
            keys,
            values,
            attn_mask=self._visible,
            enable_gqa=num_q != num_kv,
        )
        return out.transpose(1, 2).reshape(-1, num_q * head)
