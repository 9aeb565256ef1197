"""Carry out a plan inside one process: virtual ranks in tests, conversion on one machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from npr_megatron.weights.plans.plan import Copy, TransferPlan

RankStorages = Mapping[int, Mapping[str, Tensor]]
"""Storages by layout rank."""


def execute(plan: TransferPlan, sources: RankStorages, targets: RankStorages) -> None:
    """Fill the storages of all target ranks from those of all source ranks, in place."""
    copy_boxes(plan.copies, sources, targets)
    copy_boxes(plan.shares, targets, targets)


def copy_boxes(copies: Iterable[Copy], sources: RankStorages, targets: RankStorages) -> None:
    """Carry out ``copies``, in place."""
    run_moves(moves_of(copies), sources, targets)


@dataclass(frozen=True, slots=True)
class Move:
    """A copy whose index expressions are worked out, for plans that are carried out many times."""

    source_rank: int
    source_storage: str
    source_slices: tuple[slice, ...]
    target_rank: int
    target_storage: str
    target_slices: tuple[slice, ...]


def moves_of(copies: Iterable[Copy]) -> tuple[Move, ...]:
    """Prepare ``copies``."""
    return tuple(
        Move(
            copy.source_rank,
            copy.source_storage,
            copy.source_box.slices,
            copy.target_rank,
            copy.target_storage,
            copy.target_box.slices,
        )
        for copy in copies
    )


@torch.no_grad()
def run_moves(moves: Iterable[Move], sources: RankStorages, targets: RankStorages) -> None:
    """Carry out prepared copies, in place."""
    for move in moves:
        region = targets[move.target_rank][move.target_storage][move.target_slices]
        found = sources[move.source_rank][move.source_storage][move.source_slices]
        region.copy_(found.view(region.shape))
