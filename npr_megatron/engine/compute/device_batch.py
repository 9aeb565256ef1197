"""A batch on the device of the model: two copies, one of indices and one of masks, whatever the
number of groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from npr_megatron.engine.schedule.batch import Batch, QueryGroup


@dataclass(frozen=True, slots=True, eq=False)
class DeviceGroup:
    """A ``QueryGroup`` as tensors."""

    start: int
    count: int
    num_rows: int
    num_shared: int
    keys: Tensor
    """[B, L] slots."""
    visible: Tensor | None
    """bool [B, 1, 1 or S, L]."""
    padded: Tensor | None
    """[B * S] offset of each padded query inside the group."""
    kept: Tensor | None
    """[count] index into B * S."""


@dataclass(frozen=True, slots=True, eq=False)
class DeviceBatch:
    """A ``Batch`` as tensors."""

    token_ids: Tensor
    position_ids: Tensor
    slots: Tensor
    logit_index: Tensor
    groups: list[DeviceGroup]


def to_device(batch: Batch, device: torch.device) -> DeviceBatch:
    """Return ``batch`` as tensors on ``device``."""
    indices = [batch.token_ids, batch.position_ids, batch.slots, batch.logit_index]
    masks: list[np.ndarray] = []
    for group in batch.groups:
        indices += [group.keys]
        indices += [index for index in (group.padded, group.kept) if index is not None]
        if group.visible is not None:
            masks.append(group.visible)
    index_parts, mask_parts = _copy(indices, device), _copy(masks, device)
    return DeviceBatch(
        token_ids=next(index_parts),
        position_ids=next(index_parts),
        slots=next(index_parts),
        logit_index=next(index_parts),
        groups=[_group(group, index_parts, mask_parts) for group in batch.groups],
    )


def _group(group: QueryGroup, indices: Iterator[Tensor], masks: Iterator[Tensor]) -> DeviceGroup:
    keys = next(indices)
    padded = None if group.padded is None else next(indices)
    kept = None if group.kept is None else next(indices)
    visible = None
    if group.visible is not None:
        visible = next(masks).view(group.visible.shape)[:, None]
    return DeviceGroup(
        start=group.start,
        count=group.count,
        num_rows=len(group.keys),
        num_shared=group.num_shared,
        keys=keys.view(group.keys.shape),
        visible=visible,
        padded=padded,
        kept=kept,
    )


def _copy(arrays: Sequence[np.ndarray], device: torch.device) -> Iterator[Tensor]:
    """Yield each array, flat, as part of one tensor on ``device``."""
    if not arrays:
        return iter(())
    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    return iter(flat.to(device).split([array.size for array in arrays]))
