"""Prompts in the pool: shared exactly, evicted in order, never under other weights."""

from __future__ import annotations

import pytest

from npr_megatron.engine.memory.pool import SlotPool
from npr_megatron.engine.memory.prefixes import Prefix, PrefixCache
from npr_megatron.errors import EnvironmentFault


def cache_of(num_slots: int) -> tuple[SlotPool, PrefixCache]:
    pool = SlotPool(num_slots)
    cache = PrefixCache(pool)
    cache.enter(0)
    return pool, cache


def slots(pool: SlotPool, prefix: Prefix) -> list[int]:
    return pool.read(prefix.row).tolist()


def check(pool: SlotPool, cache: PrefixCache) -> None:
    pool.check_integrity()
    cache.check_integrity()


def test_rollouts_of_one_prompt_share_its_row() -> None:
    pool, cache = cache_of(32)
    first, ready = cache.acquire((5, 6, 7))
    assert ready == 0
    first.num_ready = 2
    second, ready = cache.acquire((5, 6, 7))
    assert second is first
    assert (ready, first.num_users, pool.num_free) == (2, 2, 29)


def test_prompts_that_begin_alike_share_their_beginning() -> None:
    """One instruction, three questions."""
    pool, cache = cache_of(64)
    instruction = tuple(range(100, 110))
    prompts = [(*instruction, 1, 2), (*instruction, 3), (*instruction, 1, 4, 5)]
    assert [cache.num_new_slots(prompt) for prompt in prompts] == [12, 11, 13]
    prefixes = []
    for prompt, num_new in zip(prompts, (12, 1, 2), strict=True):
        assert cache.num_new_slots(prompt) == num_new
        prefixes.append(cache.acquire(prompt)[0])
        check(pool, cache)
    assert pool.num_free == 64 - 15
    one, two, three = (slots(pool, prefix) for prefix in prefixes)
    assert one[:10] == two[:10]
    assert one[:11] == three[:11]
    assert len({*one, *two, *three}) == 15


def test_a_beginning_of_a_resident_prompt_takes_no_slot() -> None:
    pool, cache = cache_of(16)
    long, _ = cache.acquire((1, 2, 3, 4))
    long.num_ready = 3
    short, ready = cache.acquire((1, 2))
    assert ready == 2
    assert slots(pool, short) == slots(pool, long)[:2]
    assert pool.num_free == 12
    check(pool, cache)


def test_a_prompt_of_no_tokens_has_a_row_of_its_own() -> None:
    pool, cache = cache_of(4)
    first, ready = cache.acquire(())
    second, _ = cache.acquire(())
    assert (ready, first.num_ready) == (0, 0)
    assert first.row != second.row
    check(pool, cache)
    cache.release(first)
    cache.release(second)
    assert pool.num_rows == 0
    assert cache.resident == []


def test_what_is_computed_through_one_row_is_ready_in_all_that_share_it() -> None:
    _, cache = cache_of(64)
    first, _ = cache.acquire((1, 2, 3, 4, 5))
    second, ready = cache.acquire((1, 2, 3, 9))
    assert ready == 0
    second.num_ready = 2  # of the shared beginning
    assert first.num_ready == 2
    first.num_ready = 4
    assert second.num_ready == 3
    second.num_ready = 4
    assert first.num_ready == 4
    with pytest.raises(AssertionError, match="2 of 5 tokens are said to be ready, 4 were"):
        first.num_ready = 2
    with pytest.raises(AssertionError, match="6 of 5"):
        first.num_ready = 6


def test_a_half_computed_prompt_left_by_its_user_is_completed_by_the_next() -> None:
    _, cache = cache_of(64)
    first, _ = cache.acquire((1, 2, 3, 4))
    first.num_ready = 3
    other, ready = cache.acquire((1, 2, 3, 4, 5))
    assert ready == 3
    cache.release(first)
    other.num_ready = 5
    assert cache.acquire((1, 2, 3, 4)) == (first, 4)


def test_idle_prompts_go_in_the_order_of_their_last_release() -> None:
    pool, cache = cache_of(32)
    a, b, c = (cache.acquire((token,) * 4)[0] for token in (1, 2, 3))
    for prefix in (b, a, c):
        cache.release(prefix)
    cache.release(cache.acquire((2,) * 4)[0])  # b again
    assert cache.idle_slots == 12
    assert cache.evict(pool.num_free) == 0
    assert cache.evict(pool.num_free + 1) == 4
    assert {prefix.token_ids[0] for prefix in cache.resident} == {2, 3}
    assert cache.evict(pool.num_free + 5) == 8
    assert pool.num_free == 32


def test_prompts_in_use_and_what_they_borrow_are_never_evicted() -> None:
    pool, cache = cache_of(16)
    lender, _ = cache.acquire((1, 2, 3, 4))
    user, _ = cache.acquire((1, 2, 5))
    cache.release(lender)
    assert cache.idle_slots == 2  # tokens 3 and 4; 1 and 2 are borrowed
    before = slots(pool, user)
    assert cache.evict(16) == 2
    assert slots(pool, user) == before
    assert pool.num_free == 13
    cache.release(user)
    assert cache.evict(16) == 3
    assert (pool.num_rows, pool.num_free) == (0, 16)


def test_acquiring_evicts_others_but_never_what_it_shares() -> None:
    pool, cache = cache_of(8)
    shared, _ = cache.acquire((1, 2, 3, 4))
    shared.num_ready = 4
    cache.release(shared)  # the least recent
    other, _ = cache.acquire((7, 8, 9))
    cache.release(other)
    tokens = (1, 2, 3, 4, 5, 6, 7)
    assert cache.fits(tokens, 1)
    assert not cache.fits(tokens, 2)
    prefix, ready = cache.acquire(tokens)
    assert (ready, pool.num_free, prefix.num_users) == (4, 1, 1)
    assert other not in cache.resident
    check(pool, cache)


def test_only_the_part_it_shares_of_an_idle_prompt_is_kept_by_a_newcomer() -> None:
    pool, cache = cache_of(10)
    long, _ = cache.acquire((1, 2, 3, 4, 5, 6, 7, 8))
    cache.release(long)
    tokens = (1, 2, 3, 9, 9, 9)
    assert cache.fits(tokens, 4)
    assert not cache.fits(tokens, 5)
    cache.acquire(tokens)
    assert pool.num_free + cache.idle_slots == 4
    check(pool, cache)


def test_a_prompt_without_room_is_refused_and_nothing_changes() -> None:
    pool, cache = cache_of(6)
    cache.acquire((1, 2, 3, 4))
    assert not cache.fits((1, 2, 5, 6, 7, 8), 0)
    with pytest.raises(EnvironmentFault, match="4 KV slots were asked for, 2 of 6"):
        cache.acquire((1, 2, 5, 6, 7, 8))
    assert pool.num_free == 2
    check(pool, cache)


def test_prompts_of_earlier_weights_serve_their_users_and_nobody_else() -> None:
    pool, cache = cache_of(32)
    used, _ = cache.acquire((1, 2, 3))
    idle, _ = cache.acquire((1, 2, 4, 5))
    cache.release(idle)
    before = slots(pool, used)
    cache.enter(1)
    assert cache.idle_slots == 0
    assert slots(pool, used) == before
    assert cache.num_new_slots((1, 2, 3)) == 3
    fresh, ready = cache.acquire((1, 2, 3))
    assert (fresh.version, used.version, ready) == (1, 0, 0)
    assert not set(slots(pool, fresh)) & set(before)
    check(pool, cache)
    cache.release(used)  # with nobody to use it any more it is gone, and what it borrowed too
    assert pool.num_free == 29
    assert cache.resident == [fresh]
    check(pool, cache)


def test_renewed_prompts_are_found_under_the_new_version() -> None:
    _, cache = cache_of(32)
    first, _ = cache.acquire((1, 2, 3))
    first.num_ready = 3
    second, _ = cache.acquire((1, 2, 4))
    second.num_ready = 3
    renewed = cache.renew(5)
    assert [prefix.token_ids for prefix in renewed] == [(1, 2), (1, 2, 3), (1, 2, 4)]
    assert [(prefix.num_borrowed, prefix.num_ready) for prefix in renewed] == [
        (0, 2),
        (2, 3),
        (2, 3),
    ]
    assert {prefix.version for prefix in renewed} == {5}
    assert cache.acquire((1, 2, 3)) == (first, 3)


def test_a_prompt_is_released_as_often_as_it_was_acquired() -> None:
    _, cache = cache_of(8)
    prefix, _ = cache.acquire((1, 2))
    cache.release(prefix)
    with pytest.raises(AssertionError, match="nobody uses it"):
        cache.release(prefix)
