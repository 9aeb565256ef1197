"""Carry out a plan inside one process: virtual ranks in tests, conversion on one machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from npr_megatron.weights.plan import Copy, TransferPlan

Storages = Mapping[str, Tensor]


def execute(plan: TransferPlan, sources: Sequence[Storages], targets: Sequence[Storages]) -> None:
    """Fill the storages of all target ranks from those of all source ranks, in place."""
    copy_boxes(plan.copies, sources, targets)


@torch.no_grad()
def copy_boxes(
    copies: Iterable[Copy], sources: Sequence[Storages], targets: Sequence[Storages]
) -> None:
    """Carry out ``copies``; both sequences are indexed by rank."""
    for copy in copies:
        target = targets[copy.target_rank][copy.target_storage]
        source = sources[copy.source_rank][copy.source_storage]
        target[copy.target_box.slices].copy_(source[copy.source_box.slices])
