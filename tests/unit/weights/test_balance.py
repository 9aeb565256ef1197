"""Loads are as even as layouts allow: against the lower bound of every set of ranks."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.plans.balance import deal, even_shares
from npr_megatron.weights.plans.plan import plan_transfer
from tests.unit.weights.oracles import tiny_model

MOST_RANKS = 5


@st.composite
def classes(draw: st.DrawFn):
    """Totals of up to 8 classes and who of up to 5 ranks can serve each."""
    num_ranks = draw(st.integers(1, MOST_RANKS))
    sets = st.sets(st.integers(0, num_ranks - 1), min_size=1).map(lambda one: tuple(sorted(one)))
    holders = draw(st.lists(sets, min_size=1, max_size=8, unique=True))
    totals = draw(st.lists(st.integers(1, 10**9), min_size=len(holders), max_size=len(holders)))
    return totals, holders


def least_maximum(totals, holders) -> float:
    """What some set of ranks must serve among them because nobody else can, per rank (Hall)."""
    ranks = sorted({rank for one in holders for rank in one})
    return max(
        sum(total for total, one in zip(totals, holders, strict=True) if set(one) <= set(some))
        / size
        for size in range(1, len(ranks) + 1)
        for some in combinations(ranks, size)
    )


@settings(max_examples=150, deadline=None)
@given(classes())
def test_shares_reach_the_least_possible_maximum(drawn):
    totals, holders = drawn
    shares = even_shares(totals, holders)
    loads = Counter()
    for total, ranks, share in zip(totals, holders, shares, strict=True):
        assert sum(share) == total
        assert min(share) >= 0
        loads.update(dict(zip(ranks, share, strict=True)))
    assert max(loads.values()) <= 1.001 * least_maximum(totals, holders) + MOST_RANKS


@settings(max_examples=150, deadline=None)
@given(classes(), st.randoms(use_true_random=False))
def test_every_row_of_every_piece_is_dealt_once_to_a_holder(drawn, random):
    _, holders = drawn
    piece_class = np.array([random.randrange(len(holders)) for _ in range(random.randint(1, 12))])
    num_rows = np.array([random.randint(1, 9) for _ in piece_class])
    num_bytes = num_rows * [random.randint(1, 50) for _ in piece_class]
    dealt = deal(piece_class, holders, num_rows, num_bytes)
    rows = Counter()
    for piece, first, last, rank in zip(
        dealt.piece, dealt.first, dealt.last, dealt.rank, strict=True
    ):
        assert first < last
        assert rank in holders[piece_class[piece]]
        rows.update((int(piece), row) for row in range(first, last))
    assert rows == Counter((n, row) for n, height in enumerate(num_rows) for row in range(height))


def real_loads(plan, num_ranks: int, weight_bytes: int = 2) -> list[int]:
    sizes = plan.copy_table.num_bytes(weight_bytes)
    return np.bincount(plan.copy_table.source_rank, weights=sizes, minlength=num_ranks).tolist()


@pytest.mark.parametrize("dp_size", [2, 3, 8])
@pytest.mark.parametrize("engine_tp_size", [1, 4])
def test_replicas_of_a_real_model_share_the_load_within_two_percent(dp_size, engine_tp_size):
    # a small model whose embedding is a third of it, the hardest to spread
    model = tiny_model(
        num_hidden_layers=8,
        hidden_size=1024,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=100_000,
    )
    source = trainer_layout(model, ParallelConfig(dp_size=dp_size))
    loads = real_loads(plan_transfer(source, engine_layout(model, engine_tp_size)), dp_size)
    assert max(loads) <= 1.02 * sum(loads) / dp_size


def test_bytes_count_not_elements():
    # one class of large elements, one of small ones: shares follow what they weigh
    dealt = deal(
        np.array([0, 0]), [(0, 1)], num_rows=np.array([100, 100]), num_bytes=np.array([400, 100])
    )
    loads = Counter()
    for piece, first, last, rank in zip(
        dealt.piece, dealt.first, dealt.last, dealt.rank, strict=True
    ):
        loads[int(rank)] += int(last - first) * (4, 1)[piece]
    assert abs(loads[0] - loads[1]) <= 4
