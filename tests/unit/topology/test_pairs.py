"""Counted attention pairs against the dense mask."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_megatron.topology.pairs import num_visible_pairs
from npr_megatron.topology.visibility import dense_mask
from tests.packed_rows import sample_labels

trunk_then_branches = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.integers(1, 6), max_size=4)), min_size=1, max_size=4
)


def labels(parts) -> tuple[np.ndarray, np.ndarray]:
    """Return block and branch of trunk pieces, each followed by branches of the given lengths."""
    block, branch = sample_labels(1, parts, 0)
    return np.array(block, dtype=np.int32), np.array(branch, dtype=np.int32)


@settings(max_examples=200, deadline=None)
@given(trunk_then_branches)
def test_pairs_are_the_true_cells_of_the_dense_mask(parts):
    block, branch = labels(parts)
    mask = dense_mask(np.zeros_like(block), block, branch)
    assert num_visible_pairs(block, branch) == mask.sum()


def test_pairs_of_a_hand_counted_fork():
    block, branch = labels([(0, [2, 2])])
    assert num_visible_pairs(block, branch) == 11
