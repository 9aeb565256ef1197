"""A plan's squares and rectangles are the attention mask, each cell of it once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.topology.attention_plan import AttentionPlan, attention_plan
from npr_megatron.topology.context_slices import own_columns, own_slices
from npr_megatron.topology.visibility import dense_mask
from tests.packed_rows import packed_rows, sample_labels
from tests.structures import QUICK


def painted(plan: AttentionPlan, shape: tuple[int, int, int]) -> np.ndarray:
    """Return how often each query [B, S / cp, S] looks at each key."""
    cells = np.zeros(shape, np.int32)
    for part in plan.own:
        assert part.num_queries == part.num_keys
        cells[part.row, part.queries, part.keys] += np.tri(part.num_keys, dtype=np.int32)
    for part in plan.earlier:
        cells[part.row, part.queries, part.keys] += 1
    return cells


@QUICK
@given(packed_rows(), st.sampled_from([1, 2, 4]))
def test_the_plans_of_all_ranks_paint_the_mask_once(labels, cp_size):
    length = labels[0].shape[1]
    mask = dense_mask(*labels) & (labels[0] >= 0)[:, :, None]
    for rank in range(cp_size):
        plan = attention_plan(*labels, own_slices(length, rank, cp_size))
        expected = mask[:, own_columns(length, rank, cp_size)]
        np.testing.assert_array_equal(painted(plan, expected.shape), expected)
        assert plan.num_pairs == expected.sum()


def one_row(*sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    block, branch = (np.array([stream], np.int32) for stream in sample_labels(*sample))
    return np.zeros_like(block), block, branch


def test_the_example_of_the_docstring():
    plan = attention_plan(*one_row(3, [(0, [2, 1])], 1), ((0, 7),))
    own = [(part.first_query, part.num_queries, part.first_key) for part in plan.own]
    seen = [(part.queries, part.keys) for part in plan.earlier]
    assert own == [(0, 5, 0), (5, 1, 5), (6, 1, 6)]
    assert seen == [(slice(5, 6), slice(0, 3)), (slice(6, 7), slice(0, 6))]


@pytest.mark.parametrize("tokens", [10, 1000])
def test_the_number_of_parts_is_that_of_the_branches_whatever_their_length(tokens):
    blocks = [(tokens, [tokens] * 5)] * 3
    labels = one_row(tokens, blocks, tokens)
    plan = attention_plan(*labels, ((0, labels[0].shape[1]),))
    # A trunk with the first branch, four others, three times, and the trunk at the end; siblings
    # share what they look at, and each trunk behind a block looks at all before it.
    assert len(plan.own) == 3 * 5 + 1
    assert len(plan.earlier) == 3 + 3


def test_sequential_text_is_one_square_per_sample():
    segment = np.repeat([[0, 1, -1]], [5, 7, 4], axis=1).astype(np.int32)
    trunk = np.zeros_like(segment)
    plan = attention_plan(segment, trunk, trunk, ((0, 16),))
    assert [(part.first_query, part.num_keys) for part in plan.own] == [(0, 5), (5, 7)]
    assert plan.earlier == ()
