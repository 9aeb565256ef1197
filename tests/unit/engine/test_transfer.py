"""Arrays on their way to the device: packed, aligned, unchanged."""

from __future__ import annotations

import numpy as np
import torch

from npr_megatron.engine.compute.transfer import Staging, Upload, fill, place, unpack

ARRAYS = [
    np.arange(5, dtype=np.int64) - 2,
    np.array([[True, False, True]]),
    np.zeros((0, 4), np.int64),
    np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],
    np.array([0.5, -1.0], np.float32),
]


def test_packed_arrays_come_out_as_they_went_in():
    offsets, num_bytes = place(ARRAYS)
    host = np.full(num_bytes + 3, 255, np.uint8)
    fill(host, ARRAYS, offsets)
    tensors = unpack(torch.from_numpy(host), ARRAYS, offsets)
    for tensor, array in zip(tensors, ARRAYS, strict=True):
        assert tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_every_array_begins_where_any_load_may():
    offsets, num_bytes = place(ARRAYS)
    assert all(offset % 16 == 0 for offset in offsets)
    ends = [offset + array.nbytes for offset, array in zip(offsets, ARRAYS, strict=True)]
    assert all(end <= start for end, start in zip(ends, [*offsets[1:], num_bytes], strict=True))


def test_on_a_cpu_nothing_is_copied():
    array = np.arange(3)
    (tensor,) = Upload(torch.device("cpu"))([array])
    array[0] = 7
    assert tensor.tolist() == [7, 1, 2]


def test_staging_grows_and_sends_its_beginning():
    staging = Staging(torch.device("cpu"))
    staging.reserve(4)[:4] = [1, 2, 3, 4]
    staging.reserve(9)[:9] = range(9)
    target = torch.zeros(6, dtype=torch.uint8)
    staging.send(target)
    staging.reserve(9)[:9] = 77
    assert target.tolist() == [0, 1, 2, 3, 4, 5]
