"""Which requests run. Pure bookkeeping: no model, no tensors.

Admission is first come, first served, and reserves the worst case (every token a request may
generate, and its prompt unless that is resident), so a running request always gets its slots and a
small pool cannot dead-lock: it runs fewer requests at once. Rollouts of one prompt share the row of
the prompt's tokens (all but the last); the row stays while a rollout of the prompt runs or waits,
and an idle one is given up when a request at the head needs its room.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from npr_megatron.engine.flow import Flow
from npr_megatron.engine.pool import SlotPool
from npr_megatron.engine.segment import Feed

_Key = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Prefix:
    """The shared row of one prompt: every token but the last."""

    token_ids: _Key
    row: int
    num_running: int = 0

    def refill(self, pool: SlotPool) -> Feed:
        """Return the feed that recomputes the row in place."""
        return Feed.of_prefix(self.token_ids, pool.read(self.row))


class Scheduler:
    """Queues of waiting and running flows, and the prompts they share.

    Args:
        pool: rows and slots; the scheduler opens and closes prompt rows, flows their own.
        max_running: flows decoded at once.
    """

    def __init__(self, pool: SlotPool, max_running: int) -> None:
        self._pool = pool
        self._max_running = max_running
        self.waiting: deque[Flow] = deque()
        self.running: list[Flow] = []
        """In order of admission."""
        self._prefixes: dict[_Key, Prefix] = {}
        self._num_waiting: dict[_Key, int] = {}
        self._num_reserved = 0

    @property
    def num_unfinished(self) -> int:
        """Flows waiting or running."""
        return len(self.waiting) + len(self.running)

    @property
    def resident_prefixes(self) -> list[Prefix]:
        """Prompts whose tokens are in the pool."""
        return list(self._prefixes.values())

    def submit(self, flow: Flow) -> None:
        """Queue a flow that fits the pool on its own."""
        self.waiting.append(flow)
        key = _prefix_key(flow)
        self._num_waiting[key] = self._num_waiting.get(key, 0) + 1

    def admit(self) -> list[Feed]:
        """Start as many waiting flows as fit; return the feeds of prompts not yet resident."""
        feeds: list[Feed] = []
        while self.waiting and len(self.running) < self._max_running:
            flow = self.waiting[0]
            key = _prefix_key(flow)
            if not self._has_room(flow, key):
                break
            self.waiting.popleft()
            self._forget_waiting(key)
            prefix = self._prefixes.get(key)
            if prefix is None:
                prefix = self._open_prefix(key)
                if key:
                    feeds.append(prefix.refill(self._pool))
            prefix.num_running += 1
            self._num_reserved += flow.num_reserved
            flow.start(self._pool, prefix.row)
            self.running.append(flow)
        return feeds

    def drop_finished(self) -> list[Flow]:
        """Release every running flow that has ended and return them."""
        finished = [flow for flow in self.running if flow.finish is not None]
        for flow in finished:
            self._retire(flow)
        if finished:
            self.running = [flow for flow in self.running if flow.finish is None]
        return finished

    def drop_waiting(self, flow: Flow) -> None:
        """Forget a flow that never ran."""
        self.waiting.remove(flow)
        key = _prefix_key(flow)
        self._forget_waiting(key)
        self._close_if_unused(key)

    def _retire(self, flow: Flow) -> None:
        flow.release(self._pool)
        self._num_reserved -= flow.num_reserved
        key = _prefix_key(flow)
        self._prefixes[key].num_running -= 1
        self._close_if_unused(key)

    def _has_room(self, flow: Flow, key: _Key) -> bool:
        """Return whether the flow fits, giving up idle prompts of others if it takes that."""
        need = self._num_reserved + flow.num_reserved
        if key not in self._prefixes:
            need += len(key)
        for other in [] if need <= self._pool.num_slots else self.resident_prefixes:
            if other.num_running == 0 and other.token_ids != key:
                self._close_prefix(other)
                need -= len(other.token_ids)
        return need <= self._pool.num_slots

    def _open_prefix(self, key: _Key) -> Prefix:
        prefix = Prefix(key, self._pool.open_row(None, len(key)))
        self._pool.append(prefix.row, len(key))
        self._num_reserved += len(key)
        self._prefixes[key] = prefix
        return prefix

    def _close_if_unused(self, key: _Key) -> None:
        prefix = self._prefixes.get(key)
        if prefix is not None and prefix.num_running == 0 and key not in self._num_waiting:
            self._close_prefix(prefix)

    def _close_prefix(self, prefix: Prefix) -> None:
        self._pool.close(prefix.row)
        self._num_reserved -= len(prefix.token_ids)
        del self._prefixes[prefix.token_ids]

    def _forget_waiting(self, key: _Key) -> None:
        self._num_waiting[key] -= 1
        if not self._num_waiting[key]:
            del self._num_waiting[key]


def _prefix_key(flow: Flow) -> _Key:
    return flow.request.prompt_ids[:-1]
