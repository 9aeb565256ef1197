"""A flow in memory: the pool rows behind its streams, from admission to release or preemption.

The trunk's row borrows the prompt's, a branch's row borrows the trunk's, so fork and join move no
key or value: a join hands the branches' slots over to the trunk, in branch order.

A suspended tree owns nothing but its tokens. Resuming opens the same rows anew and computes all
keys and values in one masked pass, at the recorded positions; what is decoded afterwards is what
would have been decoded without the interruption.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from npr_megatron.engine.flow.flow import Flow, Stream
from npr_megatron.engine.flow.segment import Segment, linearise
from npr_megatron.engine.memory.pool import SlotArray, SlotPool
from npr_megatron.engine.memory.prefixes import Prefix
from npr_megatron.engine.schedule.feed import Feed
from npr_megatron.records.trajectory import RouteArray


@dataclass(slots=True, eq=False)
class Tree:
    """A flow and its rows.

    Args:
        flow: what decides; its streams carry their row.
    """

    flow: Flow
    age: int
    """Number of its arrival; older trees go first."""
    prefix: Prefix | None = None
    """The prompt's tokens but the last; None while the tree holds no memory."""
    round: deque[Stream] = field(default_factory=deque)
    """Streams that have not yet taken their token of this round, in branch order."""
    is_filling: bool = False
    """Whether its prompt or replay is still to be computed."""
    replay: Feed | None = None
    """What is still to be computed before the streams can go on after a suspension."""
    routed_experts: RouteArray | None = None
    """[T, M, K] of a tree that has ended, where they were recorded; see ``Trajectory``."""
    _num_fed: dict[Stream, int] = field(default_factory=dict)
    """While suspended: slots each stream owned."""

    @property
    def shared_tokens(self) -> tuple[int, ...]:
        """The part of the prompt whose keys and values other rollouts can use: all but the last."""
        return self.flow.request.prompt_ids[:-1]

    @property
    def num_suspended_slots(self) -> int:
        """Slots that a suspended tree takes when it is opened, besides the prompt's."""
        return sum(self._num_fed.values())

    @property
    def has_begun(self) -> bool:
        """Whether the flow has generated anything."""
        return self.flow.ledger.total > 0

    @property
    def capacity(self) -> int:
        """Longest row the tree may come to need."""
        request = self.flow.request
        return len(request.prompt_ids) + request.max_new_tokens

    def open(self, pool: SlotPool, prefix: Prefix) -> Feed | None:
        """Open the rows; return what is to be computed again if the tree was suspended."""
        trunk, branches = self.flow.trunk, self.flow.branches
        self.prefix = prefix
        trunk.row = pool.open_row(prefix.row, self.capacity)
        if not self._num_fed:
            return None
        pool.append(trunk.row, self._num_fed[trunk])
        for branch in branches:
            branch.row = pool.open_row(trunk.row, self.capacity)
            pool.append(branch.row, self._num_fed[branch])
        self._num_fed = {}
        return self.refill(pool)

    def close(self, pool: SlotPool) -> None:
        """Give every slot back; the prompt's are its cache's to release."""
        for branch in self.flow.branches:
            pool.close(branch.row)
            branch.row = -1
        pool.close(self.flow.trunk.row)
        self.flow.trunk.row = -1
        self.prefix = self.replay = None
        self.is_filling = False

    def num_slots(self, pool: SlotPool) -> int:
        """Return how many slots hold the keys and values of an open tree, its prompt's included."""
        branches = self.flow.branches
        num_own = sum(len(pool.read_own(branch.row)) for branch in branches)
        return int(pool.length[self.flow.trunk.row]) + num_own

    def remember(self, pool: SlotPool) -> None:
        """Note what is to be computed again, before the tree is closed to go on later."""
        streams = [self.flow.trunk, *self.flow.branches]
        num_fed = {stream: len(pool.read_own(stream.row)) for stream in streams}
        self._num_fed = num_fed if any(num_fed.values()) else {}

    def token_slots(self, pool: SlotPool) -> SlotArray:
        """Return [T] the slot of every token of an open tree, in the order of its trajectory; 0
        where a token was never fed.
        """
        parts: list[SlotArray] = []
        for segments, slots in self._parts(pool):
            num_tokens = sum(len(segment.token_ids) for segment in segments)
            parts += [slots, np.zeros(num_tokens - len(slots), np.int32)]
        return np.concatenate(parts)

    def start_again(self) -> None:
        """Forget what a closed tree has generated."""
        self.flow = self.flow.anew()
        self.round.clear()
        self._num_fed = {}

    def begin_round(self, pool: SlotPool, version: int) -> list[Feed]:
        """Start the next round: return the feeds of its forced tokens; ``round`` holds the rest.

        Slots for ``flow.num_tokens_due`` tokens must be free.
        """
        flow = self.flow
        move = flow.begin_round(version)
        if not move.opened:
            self.round = deque(flow.decoding)
        feeds = [Feed.of_tail(stream.segment, 2, stream.row, pool) for stream in move.sealed]
        if move.joined:
            pool.absorb(flow.trunk.row, [branch.row for branch in move.joined])
        is_fork = bool(flow.branches)
        for stream, num_tokens in move.opened:
            if is_fork:
                stream.row = pool.open_row(flow.trunk.row, self.capacity)
            feeds.append(Feed.of_tail(stream.segment, num_tokens, stream.row, pool, stream))
        if is_fork and move.opened:
            # The separator predicts <step> of the first branch; nothing predicts it in the others.
            feeds[0].scored.append((flow.branches[0].segment, 0))
        return feeds

    def refill(self, pool: SlotPool) -> Feed:
        """Return the feed that recomputes, in place, the keys and values of every token fed so far.

        The prompt's tokens but the last live in the prompt's own row and are left out.
        """
        parts = [(linearise(segments), slots) for segments, slots in self._parts(pool)]
        streams = {
            name: np.concatenate([part[name][: len(slots)] for part, slots in parts])
            for name in ("token_ids", "position_ids", "block", "branch")
        }
        slots = np.concatenate([slots for _, slots in parts])
        return Feed.of_tree(streams, slots, len(self.shared_tokens))

    def _parts(self, pool: SlotPool) -> list[tuple[list[Segment], SlotArray]]:
        """Return the trunk with what has joined it, then each live branch: segments, and the slots
        of the tokens fed so far.
        """
        flow = self.flow
        live = [branch.segment for branch in flow.branches]
        joined = [segment for segment in flow.segments if segment not in live]
        trunk = [(joined, pool.read(flow.trunk.row))]
        return trunk + [([branch.segment], pool.read_own(branch.row)) for branch in flow.branches]
