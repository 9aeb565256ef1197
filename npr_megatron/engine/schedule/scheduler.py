"""Which trees run, and what one step computes. Pure bookkeeping: no model, no tensors.

Admission is first come, first served, and goes by expected lengths (``memory.admission``), not by
the worst case. When slots run short after all they are reclaimed in this order:

    1. idle prompts, least recently used first;
    2. the youngest running tree is suspended: its tokens stay, its slots go, and it is the first to
       be admitted again.

Where more streams are open than a step may decode, the oldest trees go first and a round goes on in
the next step: waves. Every request fits the pool alone, and the oldest tree gives way only to
itself, so nothing dead-locks. A request is never admitted on keys and values of other weights than
those it starts under: the prefix cache knows its rows by weight version.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field

from npr_megatron.config.engine import EngineConfig
from npr_megatron.engine.flow.flow import Flow, Stream
from npr_megatron.engine.memory.admission import LengthEstimate, peak_slots
from npr_megatron.engine.memory.pool import SlotPool
from npr_megatron.engine.memory.prefixes import Prefix, PrefixCache
from npr_megatron.engine.schedule.feed import Feed
from npr_megatron.engine.schedule.tree import Tree
from npr_megatron.engine.stats import Counts

_LEAST_FEED_TOKENS = 32
"""Prompts and replays advance by so much per step however many streams decode."""


@dataclass(slots=True)
class StepPlan:
    """What one step computes."""

    streams: list[Stream] = field(default_factory=list)
    """Each feeds its last token and takes a sample. Their slots are taken by ``assemble``."""
    feeds: list[Feed] = field(default_factory=list)
    num_samples: int = 0
    num_tokens: int = 0
    num_fill_tokens: int = 0
    """How many more tokens of prompts and replays the step takes."""

    def add(self, feed: Feed) -> None:
        """Compute ``feed`` too."""
        self.feeds.append(feed)
        self.num_tokens += len(feed.token_ids)
        self.num_samples += feed.sampled is not None


class Scheduler:
    """Trees waiting and running, and the prompts they share.

    Args:
        pool: rows and slots.
        config: how much runs at once.
    """

    def __init__(self, pool: SlotPool, config: EngineConfig) -> None:
        self._pool = pool
        self._config = config
        self._version = -1
        self.prefixes = PrefixCache(pool)
        self.waiting: list[Tree] = []
        """By age; suspended trees are older than those that never ran."""
        self.running: list[Tree] = []
        """By age."""
        self.counts = Counts()
        self._estimate = LengthEstimate()
        self._num_arrived = 0
        self._num_promised = 0
        """Slots that streams of begun rounds will take."""
        self._refused: Tree | None = None
        """The first of those that wait, while nobody who runs has made room for it."""

    # Coming and going

    def submit(self, flow: Flow) -> Tree:
        """Queue a flow that fits the pool on its own."""
        tree = Tree(flow, age=self._num_arrived)
        self._num_arrived += 1
        self.waiting.append(tree)
        return tree

    def drop_waiting(self, tree: Tree) -> None:
        """Forget a tree that holds no memory."""
        self.waiting.remove(tree)

    @property
    def finished(self) -> list[Tree]:
        """Running trees whose flow has ended; they still hold their slots."""
        return [tree for tree in self.running if tree.flow.finish is not None]

    def drop_finished(self) -> list[Tree]:
        """Release and return every running tree whose flow has ended."""
        ended = self.finished
        for tree in ended:
            flow = tree.flow
            if flow.finish is not None and flow.finish.is_of_policy:
                self._estimate.observe(flow.ledger.total, flow.request.max_new_tokens)
            self.running.remove(tree)
            self._close(tree)
        return ended

    def preempt(self, tree: Tree) -> None:
        """Take the slots of a running tree; it goes on when there is room again."""
        self.running.remove(tree)
        self._num_promised -= len(tree.round)
        tree.remember(self._pool)
        self._close(tree)
        self.counts.num_preemptions += 1
        insort(self.waiting, tree, key=_age)

    def distrust_prompts(self) -> None:
        """Share no prompt computed so far with requests to come."""
        self.prefixes.enter(self._version)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless prompts and trees hold what they need, and no more."""
        self.prefixes.check_integrity()
        for tree in self.running:
            held, needed = tree.num_slots(self._pool), tree.flow.usage.resident_kv
            if held != needed:
                request_id = tree.flow.request.request_id
                raise AssertionError(f"request {request_id} holds {held} slots, needs {needed}")

    # One step

    def plan(self) -> StepPlan:
        """Decide what one step computes, and take the slots for its feeds."""
        plan = StepPlan()
        self._num_promised = sum([len(tree.round) for tree in self.running])
        ready = [tree for tree in self.running if not tree.is_filling]
        for tree in ready:
            if tree.prefix is not None:  # not suspended meanwhile, in favour of an older one
                self._advance(tree, plan, may_preempt=True)
        self._admit()
        plan.num_fill_tokens = max(
            self._config.max_step_tokens - plan.num_tokens, _LEAST_FEED_TOKENS
        )
        was_ready = set(ready)
        for tree in self.running:
            if tree not in was_ready:
                self._fill(tree, plan)
                if not tree.is_filling:
                    self._advance(tree, plan, may_preempt=False)
        return plan

    def _advance(self, tree: Tree, plan: StepPlan, *, may_preempt: bool) -> None:
        """Let the streams of a tree take their tokens, as far as the step has room."""
        room = self._config.max_streams - plan.num_samples
        if not tree.round and not tree.flow.is_due:
            # By far the commonest case, so it takes no detour: every stream feeds one token.
            streams = tree.flow.decoding
            count = len(streams)
            if count <= room and self._pool.num_free - self._num_promised >= count:
                self._num_promised += count
                plan.streams += streams
                plan.num_samples += count
                plan.num_tokens += count
                return
        if not tree.round and not self._begin_round(tree, plan, room, may_preempt=may_preempt):
            return
        count = min(len(tree.round), self._config.max_streams - plan.num_samples)
        plan.streams += [tree.round.popleft() for _ in range(count)]
        plan.num_samples += count
        plan.num_tokens += count

    def _begin_round(self, tree: Tree, plan: StepPlan, room: int, *, may_preempt: bool) -> bool:
        """Begin a round if its slots can be had; return whether it was begun."""
        flow = tree.flow
        if room < flow.num_samples_at_once:
            return False
        num_slots = flow.num_tokens_due
        is_short = self._pool.num_free - self._num_promised < num_slots
        if is_short and not (may_preempt and self._make_room(num_slots, tree)):
            return False
        for feed in tree.begin_round(self._pool, self._version):
            plan.add(feed)
        if flow.finish is not None:
            tree.round.clear()
        self._num_promised += len(tree.round)
        return True

    def _make_room(self, num_slots: int, tree: Tree) -> bool:
        """Reclaim slots for ``tree``; return False if that took its own."""
        while self._pool.num_free - self._num_promised < num_slots:
            if self.prefixes.evict(num_slots + self._num_promised):
                continue
            youngest = self.running[-1]
            self.preempt(youngest)
            if youngest is tree:
                return False
        return True

    def _fill(self, tree: Tree, plan: StepPlan) -> None:
        """Compute more of the prompt or the replay that a tree waits for."""
        prefix = tree.prefix
        assert prefix is not None, "only running trees are filled"
        num_missing = len(prefix.token_ids) - prefix.num_ready
        if num_missing and not plan.num_fill_tokens:
            return
        if num_missing:
            rest = _take(_prompt_feed(prefix, prefix.num_ready, self._pool), plan)
            prefix.num_ready = len(prefix.token_ids) - (len(rest.token_ids) if rest else 0)
            if rest is not None:
                return
        if tree.replay is not None:
            tree.replay = _take(tree.replay, plan)
        tree.is_filling = tree.replay is not None

    # Admission

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._config.max_running:
            tree = self.waiting[0]
            if tree is self._refused or not self._has_room(tree):
                self._refused = tree
                return
            self.waiting.pop(0)
            self._open(tree)

    def _has_room(self, tree: Tree) -> bool:
        """Return whether a waiting tree can be expected to finish beside those that run.

        A tree that would run alone always has room.
        """
        if not self.running:
            return True
        trees = [*self.running, tree]
        most = sum(other.flow.request.max_new_tokens for other in trees)
        if self.prefixes.fits(tree.shared_tokens, most):
            return True
        held = [other.flow.ledger.total for other in trees]
        growth = peak_slots(held, [self._expected(other) for other in trees]) - sum(held[:-1])
        at_once = tree.num_suspended_slots + tree.flow.num_tokens_due + self._num_promised
        return self.prefixes.fits(tree.shared_tokens, max(growth, at_once))

    def _expected(self, tree: Tree) -> int:
        """Slots the tree will probably still ask for, its next round at least."""
        flow = tree.flow
        total = self._estimate.expected(flow.request.max_new_tokens, flow.ledger.total)
        return max(total - flow.ledger.total, flow.num_tokens_due)

    def _open(self, tree: Tree) -> None:
        tokens = tree.shared_tokens
        prefix, num_ready = self.prefixes.acquire(tokens)
        self.prefixes.evict(tree.num_suspended_slots + self._num_promised)
        tree.replay = replay = tree.open(self._pool, prefix)
        tree.is_filling = replay is not None or num_ready < len(tokens)
        insort(self.running, tree, key=_age)
        self.counts.num_prompt_tokens += len(tokens)
        self.counts.num_cached_prompt_tokens += num_ready
        if replay is not None:
            self.counts.num_replayed_tokens += len(replay.token_ids)

    def _close(self, tree: Tree) -> None:
        prefix = tree.prefix
        assert prefix is not None, "only running trees hold memory"
        tree.close(self._pool)
        self.prefixes.release(prefix)
        self._refused = None

    # New weights

    def start_again(self, version: int) -> None:
        """Enter ``version`` with nothing: trees under way start from their prompts."""
        for tree in self.running:
            self._close(tree)
        self.waiting = sorted(self.running + self.waiting, key=_age)
        self.running = []
        for tree in self.waiting:
            if tree.has_begun:
                tree.start_again()
        self.enter(version)

    def enter(self, version: int) -> None:
        """Enter ``version`` with the keys and values at hand; no new tree gets to see them.

        Trees whose prompt or replay is half computed compute it from its beginning.
        """
        self._stop_filling()
        self._version = version
        self.prefixes.enter(version)

    def renew(self, version: int) -> list[Feed]:
        """Enter ``version`` and return what recomputes all keys and values in place, in order."""
        self._stop_filling()
        self.prefixes.evict(self._pool.num_slots)
        self._version = version
        prompts = [_own_prompt_feed(p, self._pool) for p in self.prefixes.renew(version)]
        trees = [tree.refill(self._pool) for tree in self.running]
        return [feed for feed in prompts + trees if feed is not None and len(feed.token_ids)]

    def _stop_filling(self) -> None:
        for tree in [tree for tree in self.running if tree.is_filling]:
            self.preempt(tree)


def _age(tree: Tree) -> int:
    return tree.age


def _take(feed: Feed, plan: StepPlan) -> Feed | None:
    """Compute as much of ``feed`` as the step has room for; return the rest."""
    if not plan.num_fill_tokens:
        return feed
    head, rest = feed.take(plan.num_fill_tokens)
    plan.add(head)
    plan.num_fill_tokens -= len(head.token_ids)
    return rest


def _prompt_feed(prefix: Prefix, start: int, pool: SlotPool) -> Feed:
    """Return the feed of a prompt's tokens from ``start`` on."""
    slots, length = pool.read(prefix.row), len(prefix.token_ids)
    return Feed(prefix.token_ids[start:], range(start, length), slots[start:], slots)


def _own_prompt_feed(prefix: Prefix, pool: SlotPool) -> Feed | None:
    """Return the feed of what was computed in the prompt's own slots."""
    start = prefix.num_borrowed
    if prefix.num_ready <= start:
        return None
    head, _ = _prompt_feed(prefix, start, pool).take(prefix.num_ready - start)
    return head
