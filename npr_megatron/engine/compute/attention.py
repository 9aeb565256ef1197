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
        self._groups = groups

    def __call__(self, layer: int, queries: Tensor, keys_values: Tensor) -> Tensor:
        cache = self._kv_cache[layer]
        cache.index_copy_(0, self._slots, keys_values)
        outputs = [_attend_group(group, queries, cache) for group in self._groups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_group(group: DeviceGroup, queries: Tensor, cache: Tensor) -> Tensor:
    num_kv = cache.shape[1] // 2
    num_q, head = queries.shape[1:]
    own = queries[group.start : group.start + group.count]
    if group.padded is not None:
        own = own.index_select(0, group.padded)
    read = cache.index_select(0, group.keys).view(group.num_rows, -1, 2 * num_kv, head)
    read = read.transpose(1, 2)
    keys, values = read[:, :num_kv], read[:, num_kv:]
    num_queries = len(own) // group.num_rows
    if num_queries == 1:
        # Query heads that share a key head become queries of it: no head is repeated.
        folded = own.reshape(group.num_rows, num_kv, num_q // num_kv, head)
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=group.visible)
        return out.reshape(group.num_rows, num_q * head)
    own = own.reshape(group.num_rows, num_queries, num_q, head).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        own, keys, values, attn_mask=group.visible, enable_gqa=num_q != num_kv
    )
    flat = out.transpose(1, 2).reshape(-1, num_q * head)
    return flat if group.kept is None else flat.index_select(0, group.kept)


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
