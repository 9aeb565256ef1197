"""Slices of context-parallel ranks: every token once, and equal work for all."""

from __future__ import annotations

import numpy as np
import pytest

from npr_megatron.topology.context_slices import gathered_columns, own_columns


def test_the_example_of_the_docstring():
    assert own_columns(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert own_columns(8, 1, 2).tolist() == [2, 3, 4, 5]
    assert gathered_columns(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_token_is_held_once_and_ranks_see_equally_much(size):
    length = 48 * size
    held = [own_columns(length, rank, size) for rank in range(size)]
    np.testing.assert_array_equal(np.sort(gathered_columns(length, size)), np.arange(length))
    assert len({len(columns) for columns in held}) == 1
    assert len({int((columns + 1).sum()) for columns in held}) == 1
