"""Pool and prompt cache against a slow model that knows every token's slot.

The model is a set of token strings: a row is the tuple of all its tokens and the epoch it belongs
to, the slot of a token is looked up by the string that ends with it, who holds what follows from
comparing strings. It shares no code and no structure with the radix tree.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from npr_megatron.engine.memory.pool import SlotPool
from npr_megatron.engine.memory.prefixes import Prefix, PrefixCache
from npr_megatron.errors import EnvironmentFault

Tokens = tuple[int, ...]
Key = tuple[int, Tokens]
"""Epoch and tokens."""


@dataclass
class Trajectory:
    """What one user of a prompt holds: a trunk row, and between fork and join branch rows."""

    key: Key
    prefix: Prefix
    trunk: int
    trunk_slots: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    branch_slots: list[list[int]] = field(default_factory=list)


class Model:
    """Strings only: what a cache of prompts must hold, and in which order it gives it up."""

    def __init__(self) -> None:
        self.epoch = 0
        self.released: dict[Key, int] = {}
        """Every row, and when it was last let go."""
        self.slot: dict[Key, int] = {}
        """Of the last token of every beginning of a row."""
        self.ready: set[Key] = set()
        """Beginnings whose last token is computed."""
        self.users: list[Key] = []
        self.now = 0

    def rows(self) -> list[Tokens]:
        return [tokens for epoch, tokens in self.released if epoch == self.epoch]

    def num_shared(self, tokens: Tokens) -> int:
        return max((_common(tokens, row) for row in self.rows()), default=0)

    def is_held(self, key: Key) -> bool:
        epoch, tokens = key
        return any(e == epoch and user[: len(tokens)] == tokens for e, user in self.users)

    def own(self, key: Key) -> list[Key]:
        """The beginnings whose last token this row owns."""
        epoch, tokens = key
        lent = [
            len(row)
            for e, row in self.released
            if e == epoch and row == tokens[: len(row)] != tokens
        ]
        return [(epoch, tokens[:end]) for end in range(max(lent, default=0) + 1, len(tokens) + 1)]

    def idle(self) -> list[Key]:
        return sorted(
            (key for key in self.released if not self.is_held(key)), key=lambda k: self.released[k]
        )

    def acquire(self, tokens: Tokens) -> Key:
        shared = tokens[: self.num_shared(tokens)]
        for row in (shared, tokens):
            if row:
                self.released.setdefault((self.epoch, row), self.now)
        self.users.append((self.epoch, tokens))
        return self.epoch, tokens

    def release(self, key: Key) -> None:
        before = [row for row in self.released if self.is_held(row)]
        self.users.remove(key)
        for row in sorted(before, key=lambda row: -len(row[1])):
            if not self.is_held(row):
                self.now += 1
                self.released[row] = self.now
                if row[0] != self.epoch:
                    self.close(row)

    def close(self, key: Key) -> None:
        for beginning in self.own(key):
            del self.slot[beginning]
            self.ready.discard(beginning)
        del self.released[key]

    def num_ready(self, key: Key) -> int:
        epoch, tokens = key
        count = 0
        while count < len(tokens) and (epoch, tokens[: count + 1]) in self.ready:
            count += 1
        return count


def _common(one: Tokens, other: Tokens) -> int:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


class Walk:
    """A random walk of a real pool and cache beside the model; they agree after every move."""

    def __init__(self, seed: int, cache_type: type[PrefixCache] = PrefixCache) -> None:
        self.random = random.Random(seed)
        self.pool = SlotPool(self.random.choice([12, 30, 60, 200]))
        self.cache = cache_type(self.pool)
        self.cache.enter(0)
        self.version = 0
        self.model = Model()
        self.live: list[Trajectory] = []
        self.moves = [
            (6, self.acquire),
            (4, self.release),
            (4, self.compute),
            (5, self.grow),
            (2, self.fork),
            (3, self.grow_branches),
            (2, self.join),
            (1, self.evict),
            (0.3, self.enter),
            (0.3, self.renew),
        ]
        self.num_refused = 0

    def run(self, num_moves: int) -> None:
        weights, moves = zip(*self.moves, strict=True)
        for move in self.random.choices(moves, weights, k=num_moves):
            move()
            self.compare()
        while self.live:
            self.release()
            self.compare()
        self.cache.evict(self.pool.num_slots)
        assert (self.pool.num_free, self.pool.num_rows) == (self.pool.num_slots, 0)

    def prompt(self) -> Tokens:
        """A few tokens only, so that many prompts begin alike."""
        if self.model.released and self.random.random() < 0.4:
            tokens = self.random.choice(list(self.model.released))[1]
            keep = self.random.randint(0, len(tokens))
            return (
                *tokens[:keep],
                *self.random.choices((1, 2), k=self.random.choice([0, 0, 1, 5])),
            )
        return tuple(self.random.choices((1, 2), k=self.random.randint(0, 9)))

    def acquire(self) -> None:
        tokens, model, pool = self.prompt(), self.model, self.pool
        num_new = len(tokens) - model.num_shared(tokens)
        assert self.cache.num_new_slots(tokens) == num_new
        beginnings = {(model.epoch, tokens[:end]) for end in range(1, len(tokens) - num_new + 1)}
        idle = {beginning for key in model.idle() for beginning in model.own(key)}
        room = pool.num_free + len(idle - beginnings) - num_new
        assert self.cache.fits(tokens, room)
        assert not self.cache.fits(tokens, room + 1)
        num_ready = model.num_ready((model.epoch, tokens))
        if room < 0:
            self.num_refused += 1
            split = (model.epoch, tokens[: len(tokens) - num_new])
            with pytest.raises(EnvironmentFault):
                self.cache.acquire(tokens)
            # What it would have shared was held for a moment; others may have been given up.
            self.forget_refused(split)
            return
        free = pool.num_free
        key = model.acquire(tokens)
        prefix, ready = self.cache.acquire(tokens)
        self.drop_evicted(num_new - free)
        assert (prefix.token_ids, prefix.version, ready) == (tokens, self.version, num_ready)
        self.note(key, prefix)
        self.live.append(Trajectory(key, prefix, pool.open_row(prefix.row, 64)))

    def forget_refused(self, split: Key) -> None:
        """A refused prompt evicts all it could, and leaves what it shares as the last released."""
        if split[1]:
            self.model.released.setdefault(split, self.model.now)
            self.model.users.append(split)
        self.drop_evicted(10**9)
        if split[1]:
            self.model.release(split)

    def drop_evicted(self, num_missing: int) -> None:
        """Close in the model what the cache must have evicted to free so many slots."""
        for key in self.model.idle():
            if num_missing <= 0:
                return
            num_missing -= len(self.model.own(key))
            self.model.close(key)

    def note(self, key: Key, prefix: Prefix) -> None:
        """Learn the slots of tokens that are new; those of known ones are compared."""
        for end, slot in enumerate(self.pool.read(prefix.row).tolist(), start=1):
            self.model.slot.setdefault((key[0], key[1][:end]), slot)

    def release(self) -> None:
        if not self.live:
            return
        trajectory = self.live.pop(self.random.randrange(len(self.live)))
        for row in trajectory.branches:
            self.pool.close(row)
        self.pool.close(trajectory.trunk)
        self.cache.release(trajectory.prefix)
        self.model.release(trajectory.key)

    def compute(self) -> None:
        if not self.live:
            return
        trajectory = self.random.choice(self.live)
        prefix, (epoch, tokens) = trajectory.prefix, trajectory.key
        prefix.num_ready = self.random.randint(prefix.num_ready, len(tokens))
        self.model.ready |= {(epoch, tokens[:end]) for end in range(1, prefix.num_ready + 1)}

    def grow(self) -> None:
        free = [trajectory for trajectory in self.live if not trajectory.branches]
        count = self.random.randint(1, 4)
        if free and count <= self.pool.num_free:
            trajectory = self.random.choice(free)
            trajectory.trunk_slots += self.pool.append(trajectory.trunk, count).tolist()

    def fork(self) -> None:
        free = [trajectory for trajectory in self.live if not trajectory.branches]
        if free:
            trajectory = self.random.choice(free)
            count = self.random.randint(1, 5)
            trajectory.branches = [self.pool.open_row(trajectory.trunk, 64) for _ in range(count)]
            trajectory.branch_slots = [[] for _ in range(count)]

    def grow_branches(self) -> None:
        """One token for any branches of any trajectories at once."""
        chosen = [
            (row, slots)
            for trajectory in self.live
            for row, slots in zip(trajectory.branches, trajectory.branch_slots, strict=True)
            if self.random.random() < 0.7
        ]
        if chosen and len(chosen) <= self.pool.num_free:
            new = self.pool.append_one_each(np.array([row for row, _ in chosen]))
            for (_, slots), slot in zip(chosen, new.tolist(), strict=True):
                slots.append(slot)

    def join(self) -> None:
        forked = [trajectory for trajectory in self.live if trajectory.branches]
        if forked:
            trajectory = self.random.choice(forked)
            self.pool.absorb(trajectory.trunk, trajectory.branches)
            trajectory.trunk_slots += [slot for own in trajectory.branch_slots for slot in own]
            trajectory.branches, trajectory.branch_slots = [], []

    def evict(self) -> None:
        target = self.random.randint(0, self.pool.num_slots)
        free = self.pool.num_free
        freed = self.cache.evict(target)
        self.drop_evicted(target - free)
        assert freed == self.pool.num_free - free

    def enter(self) -> None:
        self.version += self.random.randint(0, 1)
        self.cache.enter(self.version)
        self.drop_evicted(10**9)
        self.model.epoch += 1

    def renew(self) -> None:
        self.version += 1
        rows = self.cache.renew(self.version)
        done: set[int] = set()
        for prefix in rows:  # lenders first, and every computed slot exactly once
            slots = self.pool.read(prefix.row)[: prefix.num_ready].tolist()
            assert set(slots[: prefix.num_borrowed]) <= done
            assert not done & set(slots[prefix.num_borrowed :])
            done |= set(slots)
        assert done == {self.model.slot[key] for key in self.model.ready}

    def compare(self) -> None:
        self.pool.check_integrity()
        self.cache.check_integrity()
        model, cache, pool = self.model, self.cache, self.pool
        cached = [prefix for prefix in cache.resident if prefix.token_ids]
        assert sorted(p.token_ids for p in cached if p.is_findable) == sorted(model.rows())
        assert len(cached) == len(model.released)
        assert cache.idle_slots == sum(len(model.own(key)) for key in model.idle())
        owned = list(model.slot.values())
        for trajectory in self.live:
            epoch, tokens = trajectory.key
            prompt = [model.slot[epoch, tokens[:end]] for end in range(1, len(tokens) + 1)]
            assert pool.read(trajectory.prefix.row).tolist() == prompt
            trunk = prompt + trajectory.trunk_slots
            assert pool.read(trajectory.trunk).tolist() == trunk
            for row, own in zip(trajectory.branches, trajectory.branch_slots, strict=True):
                assert pool.read(row).tolist() == trunk + own
                owned += own
            owned += trajectory.trunk_slots
            assert trajectory.prefix.num_ready == model.num_ready(trajectory.key)
        assert len(owned) == len(set(owned)) == pool.num_slots - pool.num_free


@pytest.mark.parametrize("seed", range(40))
def test_random_walks_agree_with_a_model_of_strings(seed: int) -> None:
    num_refused = 0
    for part in range(10):
        walk = Walk(seed * 1000 + part)
        walk.run(60)
        num_refused += walk.num_refused
    assert num_refused  # small pools do run out


class EvictsTheLatest(PrefixCache):
    def evict(self, num_slots: int) -> int:
        before = self._pool.num_free
        while self._pool.num_free < num_slots and self._idle:
            self._close(next(reversed(self._idle)))
        return self._pool.num_free - before


class ForgetsWhatItBorrows(PrefixCache):
    def _hold(self, prefix: Prefix) -> None:
        prefix.num_holders += 1
        if prefix in self._idle:
            del self._idle[prefix]
            self._num_idle_slots -= prefix.num_own


class SharesOneTokenLess(PrefixCache):
    def _find(self, tokens: Tokens) -> tuple[Prefix | None, int]:
        prefix, num_shared = super()._find(tokens)
        return (prefix, num_shared) if num_shared != 4 else (None, 0)


class SharesOneTokenMore(PrefixCache):
    def _find(self, tokens: Tokens) -> tuple[Prefix | None, int]:
        prefix, num_shared = super()._find(tokens)
        if prefix is None or not prefix.num_borrowed < num_shared < len(prefix.token_ids) - 1:
            return prefix, num_shared
        return prefix, min(num_shared + 1, len(tokens))


class ForgetsWhatIsComputed(PrefixCache):
    def _split(self, prefix: Prefix, num_tokens: int) -> Prefix:
        upper = super()._split(prefix, num_tokens)
        upper._num_computed = 0
        return upper


class ServesOldWeights(PrefixCache):
    def enter(self, version: int) -> None:
        self.evict(self._pool.num_slots)
        self._version = version


class EvictsWhatItIsAboutToShare(PrefixCache):
    def acquire(self, token_ids: Tokens) -> tuple[Prefix, int]:
        self.evict(self.num_new_slots(token_ids))
        return super().acquire(token_ids)


class LeavesUnfindableRowsOpen(PrefixCache):
    def _let_go(self, prefix: Prefix) -> None:
        if prefix.is_findable:
            super()._let_go(prefix)
        else:
            prefix.num_holders -= 1


@pytest.mark.parametrize(
    "defect",
    [
        EvictsTheLatest,
        ForgetsWhatItBorrows,
        SharesOneTokenLess,
        SharesOneTokenMore,
        ForgetsWhatIsComputed,
        ServesOldWeights,
        EvictsWhatItIsAboutToShare,
        LeavesUnfindableRowsOpen,
    ],
)
def test_random_walks_find_a_planted_defect(defect: type[PrefixCache]) -> None:
    with pytest.raises((AssertionError, KeyError, pytest.fail.Exception)):
        for seed in range(400):
            Walk(seed, defect).run(60)
