"""Which keys and values live trajectories hold between their stages.

Between two stages of a trajectory nothing of it runs, and SGLang may evict what nothing holds. A
lease is a lock of SGLang's radix tree that outlives the stage that took it. Pure: it says which
locks are to be given back and knows nothing of the tree.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Generic, TypeVar

TIMEOUT_S = 3600.0
"""A trajectory of which no stage began or ended for so long is taken for dead: its client went away
without a word. If it lives after all, its next join is refused and it is replayed."""
_MOST_ENDED = 1 << 16
"""Ended trajectories that are remembered."""

Lock = TypeVar("Lock")


class Leases(Generic[Lock]):
    """Locks by trajectory. Every method returns the locks that the caller must give back."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._locks: dict[str, list[Lock]] = {}
        self._seen_at: dict[str, float] = {}
        self._stirred: set[str] = set()
        self._ended: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._locks.values()))

    def stir(self, trajectory: str) -> None:
        """Note that a stage of this trajectory began or ended."""
        self._stirred.add(trajectory)

    def hold(self, trajectory: str, lock: Lock, *, alone: bool) -> list[Lock]:
        """Keep a lock for this trajectory.

        Args:
            alone: it replaces all that the trajectory held.

        Returns:
            What it replaces; the lock itself if the trajectory has ended meanwhile: a stage that
            was given up may still run to its end.
        """
        if trajectory in self._ended:
            return [lock]
        replaced = self._locks.pop(trajectory, []) if alone else []
        self._locks.setdefault(trajectory, []).append(lock)
        self.stir(trajectory)
        return replaced

    def end(self, trajectories: Iterable[str]) -> list[Lock]:
        """End the leases of these trajectories, for good; of unknown ones there are none."""
        locks: list[Lock] = []
        for trajectory in trajectories:
            locks += self._drop(trajectory)
            self._ended[trajectory] = None
            self._ended.move_to_end(trajectory)
        while len(self._ended) > _MOST_ENDED:
            self._ended.popitem(last=False)
        return locks

    def expire(self, now: float) -> list[Lock]:
        """End the leases of trajectories of which nothing was seen for ``timeout_s``.

        ``now`` is the only clock there is: what stirred since the last call counts as seen now.
        """
        for trajectory in self._stirred:
            self._seen_at[trajectory] = now
        self._stirred.clear()
        late = [name for name, at in self._seen_at.items() if now - at > self._timeout_s]
        return [lock for trajectory in late for lock in self._drop(trajectory)]

    def clear(self) -> None:
        """Forget every lock, without giving it back: the tree was emptied."""
        self._locks.clear()
        self._seen_at.clear()
        self._stirred.clear()

    def _drop(self, trajectory: str) -> list[Lock]:
        self._seen_at.pop(trajectory, None)
        self._stirred.discard(trajectory)
        return self._locks.pop(trajectory, [])
