"""Batches: what is fed where, who reads what, and which beginnings are read once."""

from __future__ import annotations

import pickle
from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.engine.memory.pool import NO_PARENT, SlotPool
from npr_megatron.engine.schedule.batch import Batch, QueryGroup, assemble
from npr_megatron.engine.schedule.families import MIN_SAVED_READS, find_families
from npr_megatron.engine.schedule.feed import Feed
from tests.ragged import RaggedRows, random_rows
from tests.structures import QUICK


def _seen(group: QueryGroup) -> list[set[int]]:
    """Return, per token of a group, the slots its mask lets through."""
    num_rows, longest = group.keys.shape
    if group.lengths is not None:
        seen = np.arange(longest) < group.lengths[:, None]
    else:
        assert group.visible is not None
        seen = group.visible.reshape(-1, longest)
    num_queries = len(seen) // num_rows
    keys = np.repeat(group.keys, num_queries, axis=0)
    kept = range(len(seen)) if group.kept is None else group.kept.tolist()
    return [set(keys[query][seen[query]].tolist()) for query in kept]


@QUICK
@given(seed=st.integers(0, 10_000))
def test_groups_partition_the_batch_and_read_what_each_token_may(seed: int) -> None:
    rows = random_rows(seed)
    batch, _, _ = assemble(rows.streams, rows.feeds, rows.pool)
    expected = rows.reads_of(batch)
    start = 0
    for group in batch.groups:
        assert group.start == start
        assert _seen(group) == [set(reads) for reads in expected[start : start + group.count]]
        shared = group.keys[:, : group.num_shared]
        assert (shared == shared[:1]).all()
        start += group.count
    assert start == len(batch.token_ids) == len(batch.position_ids)
    assert len(set(batch.slots.tolist())) == len(batch.slots)


@QUICK
@given(seed=st.integers(0, 10_000))
def test_each_logit_belongs_to_the_token_it_is_said_to(seed: int) -> None:
    rows = random_rows(seed)
    batch, sampled, scored = assemble(rows.streams, rows.feeds, rows.pool)
    assert sampled == rows.streams + [f.sampled for f in rows.feeds if f.sampled is not None]
    fed = list(zip(batch.token_ids.tolist(), batch.position_ids.tolist(), strict=True))
    logit_tokens = [fed[index] for index in batch.logit_index.tolist()]
    assert len(logit_tokens) == len(sampled) + len(scored)
    for stream, token in zip(sampled, logit_tokens, strict=False):
        segment = stream.segment
        assert token == (segment.token_ids[-1], segment.position_ids[-1])
        assert int(rows.pool.table[stream.row, rows.pool.length[stream.row] - 1]) in batch.slots
    for (segment, index), token in zip(scored, logit_tokens[len(sampled) :], strict=True):
        assert token == (segment.token_ids[index - 1], segment.position_ids[index - 1])


def test_a_batch_survives_a_pickle() -> None:
    rows = random_rows(7)
    batch, _, _ = assemble(rows.streams, rows.feeds, rows.pool)
    copy: Batch = pickle.loads(pickle.dumps(batch))
    for name in ("token_ids", "position_ids", "slots", "logit_index"):
        assert np.array_equal(getattr(copy, name), getattr(batch, name))
    for ours, theirs in zip(copy.groups, batch.groups, strict=True):
        assert np.array_equal(ours.keys, theirs.keys)
        assert ours.num_shared == theirs.num_shared


@QUICK
@given(seed=st.integers(0, 10_000), size=st.integers(1, 8))
def test_a_feed_taken_in_pieces_sees_and_scores_the_same(seed: int, size: int) -> None:
    rows = RaggedRows(np.random.default_rng(seed))
    trunk = rows.open(None, 5)
    for feed in (rows.feed_tail(trunk, 11), rows.feed_tree(rows.open(trunk, 2), 13)):
        whole = feed.mask()
        pieces: list[Feed] = []
        rest: Feed | None = feed
        while rest is not None:
            piece, rest = rest.take(size)
            pieces.append(piece)
        first = 0
        for piece in pieces:
            num_tokens, num_readable = piece.mask().shape
            assert 1 <= num_tokens <= size
            part = whole[first : first + num_tokens]
            assert np.array_equal(piece.mask(), part[:, :num_readable])
            assert not part[:, num_readable:].any()
            first += num_tokens
        assert first == len(feed.token_ids)
        assert [item for piece in pieces for item in piece.scored] == feed.scored
        assert [p.sampled for p in pieces] == [None] * (len(pieces) - 1) + [feed.sampled]
        assert np.array_equal(np.concatenate([p.slots for p in pieces]), feed.slots)


def _most_saved(rows: RaggedRows, members: list[int]) -> int:
    """Return the most reads that families can save, by trying every choice of beginnings."""
    pool = rows.pool
    chains: list[list[tuple[int, int]]] = []
    for row in members:
        chain = [(row, 0)]
        lent, lender = int(pool.own_start[row]), int(pool.parent[row])
        while lender != NO_PARENT:
            chain.append((lender, lent))
            lent, lender = min(lent, int(pool.own_start[lender])), int(pool.parent[lender])
        chains.append(chain)
    best = 0
    for choice in product(*chains):
        saved = [(choice.count(place) - 1) * place[1] for place in set(choice)]
        if all(num >= MIN_SAVED_READS for num in saved if num):
            best = max(best, sum(saved))
    return best


@QUICK
@given(seed=st.integers(0, 10_000))
def test_families_save_nearly_as_much_as_any_choice(seed: int) -> None:
    """Nearly: a finer choice must save the price of a group more than the coarser one."""
    rng = np.random.default_rng(seed)
    rows = RaggedRows(rng, SlotPool(1 << 15))
    root = rows.open(None, int(rng.choice([0, 700, 2000])))
    members: list[int] = []
    for _ in range(int(rng.integers(1, 3))):
        prompt = rows.open(root, int(rng.choice([0, 500, 2500])))
        for _ in range(int(rng.integers(1, 3))):
            trunk = rows.open(prompt, int(rng.choice([0, 40, 1800])))
            members += [rows.open(trunk, 3) for _ in range(int(rng.integers(1, 3)))]
    families = find_families(np.array(members), rows.pool)
    saved = 0
    for family, num_shared in enumerate(families.num_shared):
        chosen = [
            row for row, label in zip(members, families.labels, strict=True) if label == family
        ]
        saved += max(0, len(chosen) - 1) * num_shared
        read = [rows.pool.read(row)[:num_shared].tolist() for row in chosen]
        assert all(slots == read[0] for slots in read)
    most = _most_saved(rows, members)
    assert most - MIN_SAVED_READS * len(members) <= saved <= most
    assert (saved > 0) == (most > 0)


def test_rollouts_that_read_a_long_prompt_together_are_one_family() -> None:
    rows = RaggedRows(np.random.default_rng(0))
    system = rows.open(None, 100)
    prompts = [rows.open(system, 600), rows.open(system, 700)]
    members = [rows.open(prompt, 2) for prompt in prompts for _ in range(8)]
    branches = [rows.open(members[0], 5) for _ in range(3)]
    families = find_families(np.array(members[1:] + branches), rows.pool)
    assert sorted(families.num_shared) == [0, 700, 800]
    by_label = [families.num_shared[label] for label in families.labels]
    assert by_label == [700] * 7 + [800] * 8 + [700] * 3


def test_short_or_lonely_beginnings_are_read_row_by_row() -> None:
    rows = RaggedRows(np.random.default_rng(0))
    short, long = rows.open(None, 20), rows.open(None, 900)
    members = [rows.open(short, 3) for _ in range(30)] + [rows.open(long, 3)]
    families = find_families(np.array(members), rows.pool)
    assert families.num_shared == [0]
    assert not families.labels.any()


def test_a_header_behind_a_long_trunk_does_not_pad_the_others() -> None:
    rows = RaggedRows(np.random.default_rng(0))
    for length in (10, 1500, 12, 11):
        rows.feed_tail(rows.open(None, length), 4)
    batch, _, _ = assemble([], rows.feeds, rows.pool)
    assert [group.keys.shape for group in batch.groups] == [(3, 16), (1, 1504)]
