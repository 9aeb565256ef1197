"""Slots: every slot has one owner, fork aliases, join transfers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.engine.memory.pool import NO_PARENT, SlotPool
from npr_megatron.errors import EnvironmentFault
from tests.structures import QUICK


def test_fork_reads_the_same_slots_and_join_moves_none() -> None:
    pool = SlotPool(32)
    trunk = pool.open_row(None, 32)
    trunk_slots = pool.append(trunk, 3).tolist()
    branches = [pool.open_row(trunk, 32) for _ in range(3)]
    own = [
        pool.append(branch, length).tolist()
        for branch, length in zip(branches, (2, 1, 4), strict=True)
    ]
    for branch, slots in zip(branches, own, strict=True):
        assert pool.read(branch).tolist() == trunk_slots + slots
        assert pool.read_own(branch).tolist() == slots
    pool.absorb(trunk, branches)
    assert pool.read(trunk).tolist() == trunk_slots + own[0] + own[1] + own[2]
    assert pool.num_rows == 1
    assert pool.num_free == 32 - 10
    pool.check_integrity()
    pool.close(trunk)
    assert pool.num_free == 32


def test_slot_zero_is_never_handed_out() -> None:
    pool = SlotPool(5)
    assert sorted(pool.append(pool.open_row(None, 5), 5).tolist()) == [1, 2, 3, 4, 5]


def test_a_row_that_lends_cannot_be_closed() -> None:
    pool = SlotPool(8)
    trunk = pool.open_row(None, 8)
    pool.append(trunk, 2)
    branch = pool.open_row(trunk, 8)
    with pytest.raises(AssertionError, match="borrow"):
        pool.close(trunk)
    pool.close(branch)
    pool.close(trunk)
    assert (pool.num_free, pool.num_rows) == (8, 0)


def test_a_row_is_closed_once() -> None:
    pool = SlotPool(8)
    row = pool.open_row(None, 8)
    pool.append(row, 2)
    pool.close(row)
    with pytest.raises(AssertionError, match="not open"):
        pool.close(row)
    assert pool.num_free == 8


def test_a_row_may_borrow_a_beginning_only() -> None:
    pool = SlotPool(16)
    first = pool.open_row(None, 8)
    slots = pool.append(first, 6).tolist()
    second = pool.open_row(first, 8, length=4)
    own = pool.append(second, 3).tolist()
    assert pool.read(second).tolist() == slots[:4] + own
    assert (pool.parent[second], pool.own_start[second]) == (first, 4)
    pool.check_integrity()
    with pytest.raises(AssertionError, match="6 tokens was asked to lend 7"):
        pool.open_row(first, 8, length=7)


def test_a_row_that_lends_nothing_may_be_closed() -> None:
    pool = SlotPool(8)
    empty, full = pool.open_row(None, 8), pool.open_row(None, 8)
    pool.append(full, 2)
    rows = [pool.open_row(empty, 8), pool.open_row(full, 8, length=0)]
    assert pool.parent[rows].tolist() == [NO_PARENT, NO_PARENT]
    pool.close(empty)
    pool.close(full)
    pool.check_integrity()


def test_a_split_row_reads_what_it_read_and_lends_its_first_half() -> None:
    pool = SlotPool(32)
    root = pool.open_row(None, 8)
    pool.append(root, 2)
    row = pool.open_row(root, 8)
    pool.append(row, 5)
    before = pool.read(row).tolist()
    upper = pool.split(row, 4)
    other = pool.open_row(upper, 8)
    pool.append(other, 1)
    pool.check_integrity()
    assert pool.read(row).tolist() == before
    assert pool.read(upper).tolist() == before[:4]
    assert pool.read_own(row).tolist() == before[4:]
    assert pool.read_own(upper).tolist() == before[2:4]
    assert pool.num_free == 32 - 8
    for closed in (row, other, upper, root):
        pool.close(closed)
    assert pool.num_free == 32


@pytest.mark.parametrize("length", [0, 2, 7])
def test_a_row_is_split_within_what_it_owns(length: int) -> None:
    pool = SlotPool(16)
    root = pool.open_row(None, 8)
    pool.append(root, 2)
    row = pool.open_row(root, 8)
    pool.append(row, 5)
    with pytest.raises(AssertionError, match="owns slots 2 to 7"):
        pool.split(row, length)


def test_padding_reads_slot_zero_only() -> None:
    """Stale entries would let a row read keys and values that a later owner of a slot spoils."""
    pool = SlotPool(64)
    trunk = pool.open_row(None, 16)
    pool.append(trunk, 3)
    branches = [pool.open_row(trunk, 16) for _ in range(3)]
    for branch in branches:
        pool.append(branch, 4)
    pool.absorb(trunk, branches[:2])
    pool.close(branches[2])
    pool.close(trunk)
    rows = [pool.open_row(None, 100) for _ in range(40)]
    pool.append(rows[7], 1)
    beyond = np.arange(pool.table.shape[1]) >= pool.length[:, None]
    assert not pool.table[beyond].any()


def test_an_exhausted_pool_says_what_to_raise() -> None:
    pool = SlotPool(4)
    row = pool.open_row(None, 8)
    pool.append(row, 3)
    with pytest.raises(EnvironmentFault, match="2 KV slots were asked for, 1 of 4"):
        pool.append(row, 2)


def test_a_row_takes_no_more_tokens_than_its_place_in_the_table() -> None:
    """Compiled loops check no index by themselves."""
    pool = SlotPool(1000)
    row = np.array([pool.open_row(None, 5)])
    width = pool.table.shape[1]
    for _ in range(width):
        pool.append_one_each(row)
    with pytest.raises(IndexError, match="opened for"):
        pool.append_one_each(row)


def test_the_integrity_check_sees_a_slot_with_two_owners() -> None:
    pool = SlotPool(8)
    first, second = pool.open_row(None, 8), pool.open_row(None, 8)
    pool.append(first, 2)
    pool.append(second, 2)
    pool.table[second, 1] = pool.table[first, 0]
    with pytest.raises(AssertionError, match="owners"):
        pool.check_integrity()


def test_the_integrity_check_sees_a_slot_that_was_freed_twice() -> None:
    pool = SlotPool(8)
    first, second = pool.open_row(None, 8), pool.open_row(None, 8)
    pool.append(first, 2)
    pool.append(second, 2)
    pool.close(second)
    pool.own_start[first] = 1  # forgets one: neither free nor owned
    with pytest.raises(AssertionError, match=r"have .0. owners"):
        pool.check_integrity()
    pool.own_start[first] = 0
    pool.table[first, 0] = pool.table[first, 1]  # the same twice in one row
    with pytest.raises(AssertionError, match="owners"):
        pool.check_integrity()
    pool.close(first)  # one slot is freed twice, another never
    with pytest.raises(AssertionError, match=r"have .[02], [02]. owners"):
        pool.check_integrity()


def test_the_integrity_check_sees_a_row_that_borrows_from_another_than_its_parent() -> None:
    pool = SlotPool(8)
    trunk, other = pool.open_row(None, 8), pool.open_row(None, 8)
    pool.append(trunk, 2)
    branch = pool.open_row(trunk, 8)
    pool.parent[branch] = other
    with pytest.raises(AssertionError, match="number of borrowers"):
        pool.check_integrity()
    pool.close(other)
    with pytest.raises(AssertionError, match=r"rows .2. borrow from rows that are closed"):
        pool.check_integrity()


def test_the_integrity_check_sees_a_prefix_that_left_its_parent() -> None:
    pool = SlotPool(8)
    trunk = pool.open_row(None, 8)
    pool.append(trunk, 2)
    branch = pool.open_row(trunk, 8)
    pool.table[branch, 0] = pool.table[branch, 1]
    with pytest.raises(AssertionError, match="prefix"):
        pool.check_integrity()


@QUICK
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 99), st.integers(1, 6)), max_size=60))
def test_random_forks_joins_and_closes_agree_with_a_pool_of_plain_lists(
    moves: list[tuple[int, int, int]],
) -> None:
    pool = SlotPool(4096)
    reads: dict[int, list[int]] = {}  # row -> slots it reads
    owns: dict[int, list[int]] = {}
    children: dict[int, list[int]] = {}
    for kind, pick, amount in moves:
        leaves = [row for row in reads if not children[row]]
        row = leaves[pick % len(leaves)] if leaves else None
        if kind == 0 or row is None:
            new = pool.open_row(None, 512)
            reads[new], owns[new], children[new] = [], [], []
        elif kind == 1:
            for _ in range(amount):
                new = pool.open_row(row, 512)
                reads[new], owns[new], children[new] = list(reads[row]), [], []
                children[row].append(new)
        elif kind == 2:
            slots = pool.append(row, amount).tolist()
            reads[row] += slots
            owns[row] += slots
        elif kind == 3:
            for leaf, slot in zip(leaves, pool.append_one_each(np.array(leaves)), strict=True):
                reads[leaf].append(int(slot))
                owns[leaf].append(int(slot))
        elif kind == 4:
            parents = [
                r for r in reads if children[r] and not any(children[c] for c in children[r])
            ]
            if parents:
                parent = parents[pick % len(parents)]
                pool.absorb(parent, children[parent])
                for child in children.pop(parent):
                    reads[parent] += owns[child]
                    owns[parent] += owns.pop(child)
                    del reads[child], children[child]
                children[parent] = []
        else:
            pool.close(row)
            del reads[row], owns[row], children[row]
            for siblings in children.values():
                if row in siblings:
                    siblings.remove(row)
        pool.check_integrity()
        assert {r: pool.read(r).tolist() for r in reads} == reads
        assert pool.num_free == 4096 - sum(map(len, owns.values()))
