"""The dense mask against ancestor sets of the execution graph, in numpy and torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.topology.layout import layout_of
from npr_megatron.topology.visibility import dense_mask, visible
from tests.structures import QUICK, Structure, structures
from tests.unit.topology.oracles import ancestors_mask

SHORT = structures(max_blocks=2, max_branches=3, max_tokens=3)


def streams_of(samples: list[Structure], num_padding: int) -> tuple[np.ndarray, ...]:
    """Pack samples into one row: segment, block, branch, each [S]."""
    segment, block, branch = [], [], []
    for number, sample in enumerate(samples):
        layout = layout_of(sample.token_ids, sample.prompt_length, sample.vocabulary)
        segment += [number] * len(sample.token_ids)
        block += layout.block.tolist()
        branch += layout.branch.tolist()
    tails = ([-1] * num_padding, [0] * num_padding, [0] * num_padding)
    pairs = zip((segment, block, branch), tails, strict=True)
    return tuple(np.array(stream + tail, dtype=np.int32) for stream, tail in pairs)


@QUICK
@given(st.lists(SHORT, min_size=1, max_size=2), st.integers(0, 3))
def test_a_token_sees_its_ancestors_in_its_own_sample_and_nothing_else(samples, num_padding):
    streams = streams_of(samples, num_padding)
    expected = np.eye(len(streams[0]), dtype=bool)
    start = 0
    for sample in samples:
        stop = start + len(sample.token_ids)
        expected[start:stop, start:stop] = ancestors_mask(sample)
        start = stop
    np.testing.assert_array_equal(dense_mask(*streams), expected)


@QUICK
@given(st.lists(SHORT, min_size=2, max_size=2))
def test_torch_and_numpy_give_the_same_mask_row_by_row(samples):
    length = max(len(sample.token_ids) for sample in samples)
    rows = [streams_of([sample], length - len(sample.token_ids)) for sample in samples]
    batch = tuple(np.stack(stream) for stream in zip(*rows, strict=True))
    tensors = tuple(torch.from_numpy(stream) for stream in batch)
    in_torch, in_numpy = dense_mask(*tensors), dense_mask(*batch)
    assert in_torch.dtype == torch.bool and in_torch.shape == (2, length, length)
    np.testing.assert_array_equal(in_torch.numpy(), in_numpy)
    for row, streams in zip(in_numpy, rows, strict=True):
        np.testing.assert_array_equal(row, dense_mask(*streams))


def test_siblings_are_blind_to_each_other_and_everyone_else_is_not():
    # (block, branch): trunk, branches 1 and 2 of block 1, branch 1 of block 2
    places = np.array([(0, 0), (1, 1), (1, 2), (2, 1)])
    block, branch = places.T
    table = visible(block[:, None], branch[:, None], block[None], branch[None])
    assert table.tolist() == [
        [True, True, True, True],
        [True, True, False, True],
        [True, False, True, True],
        [True, True, True, True],
    ]


def test_inputs_are_not_modified():
    streams = [np.array([0, 0, -1], dtype=np.int32), np.zeros(3, np.int32), np.zeros(3, np.int32)]
    dense_mask(*streams)
    assert streams[0].tolist() == [0, 0, -1]


def test_topology_imports_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None; "
        "import npr_megatron.topology.layout, npr_megatron.topology.visibility as v, numpy as np; "
        "zeros = np.zeros(3, np.int32); assert v.dense_mask(zeros, zeros, zeros).sum() == 6"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
