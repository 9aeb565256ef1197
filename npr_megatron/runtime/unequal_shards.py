"""Gather and reduce-scatter of shards of unequal lengths, which NCCL has and gloo has not.

Megatron does both among the ranks that a routed expert is cut over, each of which brings as many
tokens as its routers chose. Here shards are filled up to the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

Collective = Callable[..., Tensor]
"""Megatron's own, over the first dimension: tensor, group, lengths by rank or None."""


def gather_of_any_lengths(gather: Collective) -> Collective:
    """Return ``gather`` for shards whose lengths differ as well."""

    def gather_along_first_dim(
        shard: Tensor, group: ProcessGroup, lengths: Sequence[int] | None = None, *others: bool
    ) -> Tensor:
        if lengths is None or group.size() == 1 or not any(lengths):
            return gather(shard, group, None, *others)
        longest = max(lengths)
        parts = gather(_filled(shard, longest), group, None, *others).split(longest)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    return gather_along_first_dim


def reduce_scatter_of_any_lengths(reduce_scatter: Collective) -> Collective:
    """Return ``reduce_scatter`` for shards whose lengths differ as well."""

    def reduce_scatter_along_first_dim(
        whole: Tensor, group: ProcessGroup, lengths: Sequence[int] | None = None, *others: bool
    ) -> Tensor:
        if lengths is None or group.size() == 1 or not any(lengths):
            return reduce_scatter(whole, group, None, *others)
        filled = torch.cat([_filled(part, max(lengths)) for part in whole.split([*lengths])])
        return reduce_scatter(filled, group, None, *others)[: lengths[group.rank()]].contiguous()

    return reduce_scatter_along_first_dim


def _filled(shard: Tensor, length: int) -> Tensor:
    missing = shard.new_zeros(length - len(shard), *shard.shape[1:])
    return torch.cat((shard, missing))
