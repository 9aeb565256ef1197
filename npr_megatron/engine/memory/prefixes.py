"""Prompts whose keys and values are in the pool, shared by all who begin alike.

Rows of prompts form a radix tree: two prompts with a common beginning share the row of that
beginning, also when the prompts differ behind it (one instruction, many questions). A row that is
found to be shared only in part is split there. So every row is borrowed as a whole, rows that begin
with the same token below one row are the same row, and the tree is what ``SlotPool.parent`` says.

A row is *held* while it has users or lends to a row that is held; the others are *idle* and stay
until room is needed, least recently released first. A row is released after every row that borrows
from it, so the least recent one lends to nobody.

A prompt of no tokens has nothing to share; its row is its user's alone.

Keys and values belong to the weights they were computed under: what is findable is of one version.
Rows of earlier versions live on, unfindable, for those who use them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from npr_megatron.engine.memory.pool import NO_PARENT, SlotPool
from npr_megatron.errors import EnvironmentFault

_Tokens = tuple[int, ...]


class Prefix:
    """One row of the tree: all tokens from the beginning of a prompt up to some point.

    Made and closed by :class:`PrefixCache`.
    """

    __slots__ = (
        "_num_computed",
        "borrowers",
        "is_findable",
        "lender",
        "num_holders",
        "num_users",
        "row",
        "token_ids",
        "version",
    )

    def __init__(self, token_ids: _Tokens, row: int, version: int, lender: Prefix | None) -> None:
        self.token_ids = token_ids
        self.row = row
        self.version = version
        """Weights under which its keys and values are computed."""
        self.lender = lender
        self.borrowers: dict[int, Prefix] = {}
        """By the first token they own."""
        self.is_findable = bool(token_ids)
        self.num_users = 0
        self.num_holders = 0
        """Users, and borrowers that are held."""
        self._num_computed = 0

    @property
    def num_borrowed(self) -> int:
        """Leading tokens whose slots belong to the lender."""
        return len(self.lender.token_ids) if self.lender is not None else 0

    @property
    def num_own(self) -> int:
        """Slots the row owns."""
        return len(self.token_ids) - self.num_borrowed

    @property
    def num_ready(self) -> int:
        """Leading tokens whose keys and values are computed.

        Set it when the feed of the tokens behind them is planned: every later feed of the same pass
        may read them, since a pass writes the keys and values of a layer before it reads them.
        Setting it counts for the rows borrowed from as well, so whoever uses a row may compute what
        is missing, from ``num_ready`` on, and nobody computes a token twice.
        """
        ready = len(self.token_ids)
        for prefix in self.chain():
            if prefix._num_computed < len(prefix.token_ids):
                ready = max(prefix._num_computed, prefix.num_borrowed)
        return ready

    @num_ready.setter
    def num_ready(self, num_tokens: int) -> None:
        if not self.num_ready <= num_tokens <= len(self.token_ids):
            raise AssertionError(
                f"{num_tokens} of {len(self.token_ids)} tokens are said to be ready, "
                f"{self.num_ready} were"
            )
        for prefix in self.chain():
            computed = min(num_tokens, len(prefix.token_ids))
            prefix._num_computed = max(prefix._num_computed, computed)

    def chain(self) -> Iterator[Prefix]:
        """Yield this row and those it borrows from, up to the first."""
        prefix: Prefix | None = self
        while prefix is not None:
            yield prefix
            prefix = prefix.lender


class PrefixCache:
    """The rows of prompts in ``pool``.

    Example::

        if cache.fits(tokens, num_more):
            prefix, num_ready = cache.acquire(tokens)
            ...                              # compute the rest, set prefix.num_ready
            cache.release(prefix)            # stays, idle, until room is needed
    """

    def __init__(self, pool: SlotPool) -> None:
        self._pool = pool
        self._version = -1
        self._first: dict[int, Prefix] = {}
        """Findable rows that borrow from none, by their first token."""
        self._rows: dict[Prefix, None] = {}
        """All that are open."""
        self._idle: OrderedDict[Prefix, None] = OrderedDict()
        """Least recently released first; each behind those that borrow from it."""
        self._num_idle_slots = 0

    @property
    def idle_slots(self) -> int:
        """Slots that :meth:`evict` can free."""
        return self._num_idle_slots

    @property
    def resident(self) -> list[Prefix]:
        """Every prefix in the pool, findable or only in use, lenders first."""
        return sorted(self._rows, key=lambda prefix: len(prefix.token_ids))

    def num_new_slots(self, token_ids: Sequence[int]) -> int:
        """Return how many slots :meth:`acquire` would take now."""
        return len(token_ids) - self._find(tuple(token_ids))[1]

    def fits(self, token_ids: Sequence[int], num_more: int) -> bool:
        """Return whether :meth:`acquire` would succeed, and ``num_more`` slots could be freed then.

        Idle rows that the tokens would share are not counted as room.
        """
        prefix, num_shared = self._find(tuple(token_ids))
        num_kept = 0
        while prefix is not None and not prefix.num_holders:
            num_kept += min(num_shared, len(prefix.token_ids)) - prefix.num_borrowed
            prefix = prefix.lender
        room = self._pool.num_free + self._num_idle_slots - num_kept
        return len(token_ids) - num_shared + num_more <= room

    def acquire(self, token_ids: Sequence[int]) -> tuple[Prefix, int]:
        """Find or open the row of ``token_ids`` and count one user.

        Idle rows are evicted if that takes it, never those the tokens share.

        Returns:
            The prefix, and its ``num_ready``: the caller computes the tokens from there on.

        Raises:
            EnvironmentFault: the pool has no room; nothing was opened.
        """
        tokens = tuple(token_ids)
        lender, num_shared = self._find(tokens)
        if lender is not None and num_shared < len(lender.token_ids):
            lender = self._split(lender, num_shared)
        if lender is not None and num_shared == len(tokens):
            self._hold(lender)
            prefix = lender
        else:
            prefix = self._grow(lender, tokens)
        prefix.num_users += 1
        return prefix, prefix.num_ready

    def release(self, prefix: Prefix) -> None:
        """Count one user less; the row stays, idle, unless it is unfindable."""
        if not prefix.num_users:
            raise AssertionError(f"the prompt in row {prefix.row} is released, but nobody uses it")
        prefix.num_users -= 1
        self._let_go(prefix)

    def evict(self, num_slots: int) -> int:
        """Close idle rows, least recently released first, until the pool has ``num_slots`` free.

        Returns:
            Slots freed; fewer than it would take if no row is idle any more.
        """
        num_before = self._pool.num_free
        while self._pool.num_free < num_slots and self._idle:
            self._close(next(iter(self._idle)))
        return self._pool.num_free - num_before

    def enter(self, version: int) -> None:
        """Begin anew, for weights of ``version`` or because no row so far is to be trusted: close
        idle rows; those in use live on for their users and are found by nobody else.
        """
        self.evict(self._pool.num_slots)
        for prefix in self._rows:
            prefix.is_findable = False
        self._first = {}
        self._version = version

    def renew(self, version: int) -> list[Prefix]:
        """Take every row over to the weights of ``version``.

        Returns:
            All rows, lenders first. Of each, the caller computes the tokens from ``num_borrowed``
            to ``num_ready`` anew, in place.
        """
        self._version = version
        for prefix in self._rows:
            prefix.version = version
        return self.resident

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless rows, users and the order of eviction agree."""
        for prefix in self._rows:
            self._check(prefix)
        held = [prefix for prefix in self._rows if prefix.num_holders]
        if len(held) + len(self._idle) != len(self._rows):
            raise AssertionError(f"{len(held)} rows are held and {len(self._idle)} idle")
        if self._num_idle_slots != sum(prefix.num_own for prefix in self._idle):
            raise AssertionError(f"{self._num_idle_slots} idle slots are counted")
        place = {prefix: index for index, prefix in enumerate(self._idle)}
        for prefix in self._idle:
            if any(place[borrower] > place[prefix] for borrower in prefix.borrowers.values()):
                raise AssertionError(f"row {prefix.row} would be evicted before its borrowers")

    def _check(self, prefix: Prefix) -> None:
        lender, row, pool = prefix.lender, prefix.row, self._pool
        borrowed = prefix.token_ids[: prefix.num_borrowed]
        num_holders = sum(1 for other in prefix.borrowers.values() if other.num_holders)
        facts = {
            "can be found in the tree": not prefix.is_findable
            or self._siblings(prefix).get(prefix.token_ids[prefix.num_borrowed]) is prefix,
            "is of the live version": not prefix.is_findable or prefix.version == self._version,
            "borrows a whole row that is open": lender is None
            or (lender in self._rows and borrowed == lender.token_ids),
            "borrows it in the pool": pool.own_start[row] == prefix.num_borrowed
            and pool.parent[row] == (NO_PARENT if lender is None else lender.row),
            "has a slot per token": pool.length[row] == len(prefix.token_ids),
            "counts its holders": prefix.num_holders == prefix.num_users + num_holders,
            "is closed if nobody can need it": prefix.is_findable or prefix.num_holders > 0,
        }
        if wrong := [fact for fact, holds in facts.items() if not holds]:
            raise AssertionError(f"not so of the prompt in row {row}: it {', it '.join(wrong)}")

    def _find(self, tokens: _Tokens) -> tuple[Prefix | None, int]:
        """Return the row that shares most with ``tokens``, and how many tokens that is."""
        prefix, num_shared, borrowers = None, 0, self._first
        while num_shared < len(tokens) and (child := borrowers.get(tokens[num_shared])) is not None:
            prefix, borrowers = child, child.borrowers
            num_shared = _num_common(child.token_ids, tokens, num_shared)
            if num_shared < len(child.token_ids):
                break
        return prefix, num_shared

    def _split(self, prefix: Prefix, num_tokens: int) -> Prefix:
        """Give the first ``num_tokens`` of ``prefix`` a row of their own, and return it."""
        row = self._pool.split(prefix.row, num_tokens)
        upper = Prefix(prefix.token_ids[:num_tokens], row, prefix.version, prefix.lender)
        upper._num_computed = min(prefix._num_computed, num_tokens)
        upper.borrowers[prefix.token_ids[num_tokens]] = prefix
        self._list(upper)
        prefix.lender = upper
        if prefix.num_holders:
            upper.num_holders = 1
        else:
            self._idle[upper] = None
        return upper

    def _grow(self, lender: Prefix | None, tokens: _Tokens) -> Prefix:
        """Open the row of ``tokens`` behind ``lender``, and hold it."""
        if lender is not None:
            self._hold(lender)
        num_new = len(tokens) - (0 if lender is None else len(lender.token_ids))
        self.evict(num_new)
        row = self._pool.open_row(None if lender is None else lender.row, len(tokens))
        try:
            self._pool.append(row, num_new)
        except EnvironmentFault:
            self._pool.close(row)
            if lender is not None:
                self._let_go(lender)
            raise
        prefix = Prefix(tokens, row, self._version, lender)
        prefix.num_holders = 1
        self._list(prefix)
        return prefix

    def _list(self, prefix: Prefix) -> None:
        self._rows[prefix] = None
        if prefix.is_findable:
            self._siblings(prefix)[prefix.token_ids[prefix.num_borrowed]] = prefix

    def _siblings(self, prefix: Prefix) -> dict[int, Prefix]:
        return self._first if prefix.lender is None else prefix.lender.borrowers

    def _hold(self, prefix: Prefix) -> None:
        """Count one holder, and with the first one hold what the row borrows."""
        for held in prefix.chain():
            held.num_holders += 1
            if held.num_holders > 1:
                return
            del self._idle[held]
            self._num_idle_slots -= held.num_own

    def _let_go(self, prefix: Prefix) -> None:
        """Count one holder less, and with the last one let go what the row borrows."""
        for held in prefix.chain():
            held.num_holders -= 1
            if held.num_holders:
                return
            if held.is_findable:
                self._idle[held] = None
                self._num_idle_slots += held.num_own
            else:
                self._close(held)

    def _close(self, prefix: Prefix) -> None:
        """Forget a row that lends to nobody."""
        if prefix in self._idle:
            del self._idle[prefix]
            self._num_idle_slots -= prefix.num_own
        self._pool.close(prefix.row)
        del self._rows[prefix]
        if prefix.lender is not None or prefix.is_findable:
            del self._siblings(prefix)[prefix.token_ids[prefix.num_borrowed]]


def _num_common(one: _Tokens, other: _Tokens, start: int) -> int:
    """Return how many leading tokens are the same, ``start`` of which are known to be."""
    stop = min(len(one), len(other))
    if one[start:stop] == other[start:stop]:
        return stop
    while stop - start > 1:  # the same up to start, but not up to stop
        middle = (start + stop) // 2
        if one[start:middle] == other[start:middle]:
            start = middle
        else:
            stop = middle
    return start
