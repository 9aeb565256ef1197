"""Which requests run. Pure bookkeeping: no model, no tensors.

Admission is first come, first served, and reserves the worst case (every token a request may
generate, and its prompt unless that is resident), so a running request always gets its slots and a
small pool cannot dead-lock: it runs fewer requests at once. Rollouts of one prompt share the row of
the prompt's tokens (all but the last); the row stays while a rollout of the prompt runs or waits,
and an idle one is given up when a request at the head needs its room. A row is known by its tokens
and the weight version under which it was computed: no request is admitted on keys and values of
other weights than those it starts under.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from npr_megatron.engine.flow import Flow
from npr_megatron.engine.pool import SlotPool
from npr_megatron.engine.segment import Feed

_Tokens = tuple[int, ...]
_Key = tuple[int, _Tokens]


@dataclass(slots=True, eq=False)
class Prefix:
    """The shared row of one prompt: every token but the last."""

    token_ids: _Tokens
    row: int
    version: int
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
        self._version = -1
        self.waiting: deque[Flow] = deque()
        self.running: list[Flow] = []
        """In order of admission."""
        self._prefixes: dict[_Key, Prefix] = {}
        self._prefix_of: dict[Flow, Prefix] = {}
        """Of every running flow."""
        self._num_waiting: dict[_Tokens, int] = {}
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
        self._expect(flow)

    def admit(self) -> list[Feed]:
        """Start as many waiting flows as fit; return the feeds of prompts not yet resident."""
        feeds: list[Feed] = []
        while self.waiting and len(self.running) < self._max_running:
            flow = self.waiting[0]
            tokens = _shared_tokens(flow)
            if not self._has_room(flow, tokens):
                break
            self.waiting.popleft()
            self._forget_waiting(tokens)
            prefix = self._prefixes.get((self._version, tokens))
            if prefix is None:
                prefix = self._open_prefix(tokens)
                if tokens:
                    feeds.append(prefix.refill(self._pool))
            prefix.num_running += 1
            self._prefix_of[flow] = prefix
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
        tokens = _shared_tokens(flow)
        self._forget_waiting(tokens)
        if prefix := self._prefixes.get((self._version, tokens)):
            self._close_if_unused(prefix)

    def start_again(self, version: int) -> list[Flow]:
        """Enter ``version`` with nothing: every running flow goes back to the head of the queue.

        Returns:
            The flows that take their places, in order of admission.
        """
        fresh = [flow.anew() for flow in self.running]
        for flow in self.running:
            self._retire(flow)
        self.running = []
        self.enter(version)
        self.waiting.extendleft(reversed(fresh))
        for flow in fresh:
            self._expect(flow)
        return fresh

    def renew(self, version: int) -> None:
        """Enter ``version`` with all prompts, which the caller recomputes in place."""
        prefixes, self._version = self.resident_prefixes, version
        for prefix in prefixes:
            prefix.version = version
        self._prefixes = {(version, prefix.token_ids): prefix for prefix in prefixes}

    def enter(self, version: int) -> None:
        """Enter ``version``: prompts in use stay for those who use them, new flows get new ones."""
        self._version = version
        for prefix in self.resident_prefixes:
            self._close_if_unused(prefix)

    def _retire(self, flow: Flow) -> None:
        flow.release(self._pool)
        self._num_reserved -= flow.num_reserved
        prefix = self._prefix_of.pop(flow)
        prefix.num_running -= 1
        self._close_if_unused(prefix)

    def _has_room(self, flow: Flow, tokens: _Tokens) -> bool:
        """Return whether the flow fits, giving up idle prompts of others if it takes that."""
        need = self._num_reserved + flow.num_reserved
        if (self._version, tokens) not in self._prefixes:
            need += len(tokens)
        for other in [] if need <= self._pool.num_slots else self.resident_prefixes:
            if other.num_running == 0 and other.token_ids != tokens:
                self._close_prefix(other)
                need -= len(other.token_ids)
        return need <= self._pool.num_slots

    def _open_prefix(self, tokens: _Tokens) -> Prefix:
        prefix = Prefix(tokens, self._pool.open_row(None, len(tokens)), self._version)
        self._pool.append(prefix.row, len(tokens))
        self._num_reserved += len(tokens)
        self._prefixes[(self._version, tokens)] = prefix
        return prefix

    def _close_if_unused(self, prefix: Prefix) -> None:
        is_wanted = prefix.version == self._version and prefix.token_ids in self._num_waiting
        if prefix.num_running == 0 and not is_wanted:
            self._close_prefix(prefix)

    def _close_prefix(self, prefix: Prefix) -> None:
        self._pool.close(prefix.row)
        self._num_reserved -= len(prefix.token_ids)
        del self._prefixes[(prefix.version, prefix.token_ids)]

    def _expect(self, flow: Flow) -> None:
        tokens = _shared_tokens(flow)
        self._num_waiting[tokens] = self._num_waiting.get(tokens, 0) + 1

    def _forget_waiting(self, tokens: _Tokens) -> None:
        self._num_waiting[tokens] -= 1
        if not self._num_waiting[tokens]:
            del self._num_waiting[tokens]


def _shared_tokens(flow: Flow) -> _Tokens:
    return flow.request.prompt_ids[:-1]
