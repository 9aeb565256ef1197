"""Host arrays to the device: one asynchronous copy out of pinned memory, whatever their number.

A copy out of ordinary memory makes the host wait for the device, and each copy costs a launch.
Pinned memory must not be overwritten before the device has read it, which is easily forgotten and
seldom noticed; ``Staging`` waits where it has to.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ALIGNMENT = 16
"""Of every array [bytes]: vectorised loads of any dtype."""

Bytes = npt.NDArray[np.uint8]


class Staging:
    """Host memory, pinned where the device is a GPU, that is filled and sent again and again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._host = torch.empty(0, dtype=torch.uint8)
        self._sent = torch.cuda.Event() if self._on_gpu else None

    def reserve(self, num_bytes: int) -> Bytes:
        """Return at least ``num_bytes`` to fill, when what was sent before has arrived."""
        if self._sent is not None:
            self._sent.synchronize()
        if len(self._host) < num_bytes:
            self._host = torch.empty(2 * num_bytes, dtype=torch.uint8, pin_memory=self._on_gpu)
        return self._host.numpy()

    def send(self, target: Tensor) -> None:
        """Copy the first bytes into ``target`` [bytes, uint8], in stream order.

        Nothing waits for it here.
        """
        target.copy_(self._host[: len(target)], non_blocking=True)
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self._device))


class Upload:
    """Arrays to tensors on ``device``, all of a step in one copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._staging = Staging(device)

    def __call__(self, arrays: Sequence[npt.NDArray[np.generic]]) -> list[Tensor]:
        """Return each array as a tensor of the same dtype and shape.

        On a CPU the tensors are the arrays; elsewhere they are views of one allocation.
        """
        if self._device.type == "cpu":
            return [torch.from_numpy(array) for array in arrays]
        offsets, num_bytes = place(arrays)
        fill(self._staging.reserve(num_bytes), arrays, offsets)
        packed = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._staging.send(packed)
        return unpack(packed, arrays, offsets)


def place(arrays: Sequence[npt.NDArray[np.generic]]) -> tuple[list[int], int]:
    """Return where each array begins when all are packed [bytes], and the size of the whole."""
    offsets: list[int] = []
    end = 0
    for array in arrays:
        offsets.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def fill(target: Bytes, arrays: Sequence[npt.NDArray[np.generic]], offsets: Sequence[int]) -> None:
    """Write each array at its offset."""
    for array, offset in zip(arrays, offsets, strict=True):
        part = target[offset : offset + array.nbytes].view(array.dtype)
        part.reshape(array.shape)[...] = array


def unpack(
    packed: Tensor, arrays: Sequence[npt.NDArray[np.generic]], offsets: Sequence[int]
) -> list[Tensor]:
    """Return views of ``packed`` [bytes, uint8] with the dtypes and shapes of ``arrays``."""
    views: list[Tensor] = []
    for array, offset in zip(arrays, offsets, strict=True):
        dtype = torch.from_numpy(np.zeros(0, array.dtype)).dtype
        views.append(packed[offset : offset + array.nbytes].view(dtype).view(array.shape))
    return views
