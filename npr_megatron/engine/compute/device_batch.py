"""A batch as tensors on the device of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from npr_megatron.engine.compute.model import Attend
from npr_megatron.engine.compute.transfer import Upload
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
    visible: Tensor
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


class Placed(NamedTuple):
    """What the model needs to know of a batch: its tokens, where they are kept, the logits wanted,
    how it attends.
    """

    token_ids: Tensor
    position_ids: Tensor
    slots: Tensor
    logit_index: Tensor
    attend: Attend


def to_device(batch: Batch, upload: Upload) -> DeviceBatch:
    """Return ``batch`` as tensors on the device of ``upload``: one copy, whatever the groups."""
    arrays: list[np.ndarray] = [batch.token_ids, batch.position_ids, batch.slots, batch.logit_index]
    for group in batch.groups:
        arrays += _arrays(group)
    tensors = iter(upload(arrays))
    return DeviceBatch(
        token_ids=next(tensors),
        position_ids=next(tensors),
        slots=next(tensors),
        logit_index=next(tensors),
        groups=[_group(group, tensors) for group in batch.groups],
    )


def on_host(group: QueryGroup) -> DeviceGroup:
    """Return ``group`` as tensors of the host: the same memory."""
    return _group(group, map(torch.from_numpy, _arrays(group)))


def _arrays(group: QueryGroup) -> list[np.ndarray]:
    parts = (group.keys, group.lengths, group.visible, group.padded, group.kept)
    return [part for part in parts if part is not None]


def _group(group: QueryGroup, tensors: Iterator[Tensor]) -> DeviceGroup:
    keys = next(tensors)
    if group.lengths is None:
        visible = next(tensors)[:, None]
    else:
        offsets = torch.arange(keys.shape[1], device=keys.device)
        visible = (offsets < next(tensors)[:, None])[:, None, None]
    return DeviceGroup(
        start=group.start,
        count=group.count,
        num_rows=len(group.keys),
        num_shared=group.num_shared,
        keys=keys,
        visible=visible,
        padded=None if group.padded is None else next(tensors),
        kept=None if group.kept is None else next(tensors),
    )
