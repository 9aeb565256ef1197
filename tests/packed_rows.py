"""Random labels of packed rows: several samples side by side, with blocks of unequal branches."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from npr_megatron.records.trajectory import IntArray

Labels = tuple[IntArray, IntArray, IntArray]
"""Segment, block and branch, each [B, S]."""

_lengths = st.integers(1, 6)
_blocks = st.tuples(st.integers(0, 4), st.lists(_lengths, min_size=1, max_size=5))
samples = st.tuples(_lengths, st.lists(_blocks, max_size=3), st.integers(0, 3))
"""Tokens of the prompt, 0..3 blocks (trunk before it, lengths of its branches), trunk behind."""


@st.composite
def packed_rows(draw: st.DrawFn) -> Labels:
    """1 or 2 rows of 1..4 samples, padded to a multiple of 8 tokens."""
    rows = [[sample_labels(*sample) for sample in row] for row in draw(_rows)]
    longest = max(sum(len(block) for block, _ in row) for row in rows)
    length = -(-(longest + draw(st.integers(0, 5))) // 8) * 8
    return _filled(rows, length)


_rows = st.lists(st.lists(samples, min_size=1, max_size=4), min_size=1, max_size=2)


def sample_labels(
    prompt: int, blocks: list[tuple[int, list[int]]], end: int
) -> tuple[list[int], list[int]]:
    """Return block and branch of each token of one sample."""
    block, branch = [0] * prompt, [0] * prompt
    for number, (trunk, branches) in enumerate(blocks, start=1):
        block += [0] * trunk
        branch += [0] * trunk
        for index, length in enumerate(branches, start=1):
            block += [number] * length
            branch += [index] * length
    return block + [0] * end, branch + [0] * end


def _filled(rows: list[list[tuple[list[int], list[int]]]], length: int) -> Labels:
    segment, block, branch = np.zeros((3, len(rows), length), np.int32)
    segment[:] = -1
    for number, row in enumerate(rows):
        start = 0
        for sample, (blocks, branches) in enumerate(row):
            cells = slice(start, start + len(blocks))
            segment[number, cells] = sample
            block[number, cells], branch[number, cells] = blocks, branches
            start = cells.stop
    return segment, block, branch
