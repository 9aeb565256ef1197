"""Rows of an endless stream: whole, once per epoch, well filled, and dealt evenly."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_megatron.data.packing import deal, pack_rows
from npr_megatron.data.row_plan import RowStream, plan_epoch
from tests.unit.data.test_packing import make_sample

lengths_lists = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def realistic_lengths(kind: str, count: int = 6000) -> np.ndarray:
    """Lengths of reasoning answers, chat turns, and a mix of both with a tail up to the row."""
    rng = np.random.default_rng(7)
    answers = rng.lognormal(np.log(1800), 0.7, count)
    turns = rng.lognormal(np.log(220), 1.0, count)
    drawn = {
        "answers": answers,
        "turns": turns,
        "mix": np.where(rng.random(count) < 0.5, answers, turns),
    }
    return np.clip(drawn[kind], 16, 8192).astype(np.int64)


@settings(max_examples=60, deadline=None)
@given(lengths_lists, st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_holds_every_sample_once_in_rows_that_fit(lengths, seed, epoch):
    rows = plan_epoch(np.array(lengths), 50, seed, epoch)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 50


@settings(max_examples=60, deadline=None)
@given(lengths_lists, st.integers(1, 9), st.integers(0, 12))
def test_a_step_gets_the_same_rows_whenever_it_asks(lengths, count, step):
    whole = RowStream(np.array(lengths), 50, seed=1)
    everything = whole.take(0, count * (step + 1))
    assert RowStream(np.array(lengths), 50, seed=1).take(step * count, count) == everything[-count:]


def test_epochs_follow_without_a_seam_and_each_holds_all_samples():
    lengths = np.arange(1, 40)
    stream = RowStream(lengths, 64, seed=0)
    rows = stream.take(0, stream.num_rows(3))
    assert set(Counter(itertools.chain(*rows)).values()) == {3}
    assert [stream.epoch_of(row) for row in (0, stream.num_rows(1) - 1, stream.num_rows(1))] == [
        0,
        0,
        1,
    ]


def test_epochs_and_seeds_are_shuffled_differently():
    lengths = np.full(100, 10)
    plans = [plan_epoch(lengths, 50, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(plan) for plan in plans}) == 4


@pytest.mark.parametrize("kind", ["answers", "turns", "mix"])
def test_realistic_lengths_fill_more_than_95_percent_of_the_rows(kind):
    lengths = realistic_lengths(kind)
    num_rows = len(plan_epoch(lengths, 8192, seed=0, epoch=0))
    assert lengths.sum() / (num_rows * 8192) > 0.95


def test_realistic_microbatches_lose_less_than_5_percent_to_padding():
    lengths = realistic_lengths("mix", 400)
    stream = RowStream(lengths, 8192, seed=0)
    samples = [make_sample(int(length), key) for key, length in enumerate(lengths)]
    rows = [[samples[i] for i in row] for row in stream.take(0, 32)]
    batches = pack_rows(rows, rows_per_microbatch=2, num_replicas=4)
    cells = sum(batch.token_ids.size for batch in batches)
    assert sum(batch.num_tokens for batch in batches) / cells > 0.95


deals = st.tuples(
    st.lists(st.integers(0, 100), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 4)
)


@settings(max_examples=200, deadline=None)
@given(deals)
def test_every_row_gets_a_place_of_its_own(case):
    costs, rows_each, replicas = case
    num_microbatches = -(-len(costs) // (rows_each * replicas)) * replicas
    place = deal(np.array(costs), num_microbatches, rows_each, replicas)
    assert len(set(place.tolist())) == len(costs)
    assert place.min() >= 0 and place.max() < num_microbatches * rows_each


def replica_loads(costs, place, rows_each, replicas) -> np.ndarray:
    return np.bincount(place // rows_each % replicas, weights=costs, minlength=replicas)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=8))
def test_no_replica_waits_much_longer_than_the_best_split_makes_it(costs):
    costs = np.array(costs + [0] * (len(costs) % 2))
    half = len(costs) // 2
    place = deal(costs, len(costs), 1, 2)
    best = min(
        max(sum(chosen), costs.sum() - sum(chosen))
        for chosen in itertools.combinations(costs.tolist(), half)
    )
    assert replica_loads(costs, place, 1, 2).max() <= best * 4 / 3


def test_realistic_rows_keep_replicas_within_2_percent_of_one_another():
    lengths = realistic_lengths("mix")
    rows = plan_epoch(lengths, 8192, seed=0, epoch=0)[:128]
    costs = np.array([sum(lengths[i] ** 2 for i in row) for row in rows])
    loads = replica_loads(costs, deal(costs, 16, 8, 8), 8, 8)
    by_turn = replica_loads(costs, np.arange(128) % 16 * 8 + np.arange(128) // 16, 8, 8)
    assert loads.max() / loads.mean() < 1.02
    assert by_turn.max() / by_turn.mean() > 1.1, "dealing by turn would have done as well"
