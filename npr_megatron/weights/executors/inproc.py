"""Carry out a plan inside one process: virtual ranks in tests, conversion on one machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from npr_megatron.weights.plan import Copy, TransferPlan

RankStorages = Mapping[int, Mapping[str, Tensor]]
"""Storages by layout rank."""


def execute(plan: TransferPlan, sources: RankStorages, targets: RankStorages) -> None:
    """Fill the storages of all target ranks from those of all source ranks, in place."""
    copy_boxes(plan.copies, sources, targets)
    copy_boxes(plan.shares, targets, targets)


@torch.no_grad()
def copy_boxes(copies: Iterable[Copy], sources: RankStorages, targets: RankStorages) -> None:
    """Carry out ``copies``, in place."""
    for copy in copies:
        region = targets[copy.target_rank][copy.target_storage][copy.target_box.slices]
        source = sources[copy.source_rank][copy.source_storage]
        region.copy_(source[copy.source_box.slices].view(region.shape))
