"""The scheduler's whole world without a model: a stand-in whose keys are numbers.

What a transformer keeps per token depends on the token, its position, the weights and everything it
reads. Here that is one 64-bit number, mixed from just these, and a sample is drawn from the number
of the token before it. So one slot that is read and should not be, or that holds something stale,
changes every number behind it, and numbers are compared exactly. Everything but the model is real:
scheduler, pool, prompts, flows, feeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from npr_megatron.config.engine import EngineConfig
from npr_megatron.engine.flow.flow import Flow, Stream, Teacher
from npr_megatron.engine.flow.segment import Segment
from npr_megatron.engine.memory.pool import SlotPool
from npr_megatron.engine.schedule.feed import Feed
from npr_megatron.engine.schedule.scheduler import Scheduler
from npr_megatron.engine.schedule.tree import Tree
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import FinishReason, Trajectory
from npr_megatron.schema.grammar import Grammar
from npr_megatron.topology.visibility import dense_mask
from tests.structures import SMALL, WORDS

_STALE = np.uint64(0xDEAD)
_ODD = np.uint64(0x9E3779B97F4A7C15)


def mix(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scatter 64-bit numbers (the finaliser of splitmix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def key_of(token_id: int, position: int, version: int, read: npt.NDArray[np.uint64]) -> np.uint64:
    """What one token leaves in its slot. The order in which it reads others does not matter."""
    own = np.array([token_id * 1_000_003 + position * 7 + version * 50_021 + 1], np.uint64)
    return mix(mix(own * _ODD) + mix(read * _ODD).sum(keepdims=True))[0]


class World:
    """A scheduler and the loop around it.

    Args:
        config: pool size, concurrency, tokens per step.
        scheduler_type: one with a planted defect, to see that it is found.
    """

    def __init__(self, config: EngineConfig, scheduler_type: type[Scheduler] = Scheduler) -> None:
        self.config = config
        self.pool = SlotPool(config.num_kv_slots)
        self.scheduler = scheduler_type(self.pool, config)
        self.version = 0
        self.scheduler.enter(0)
        self.keys = np.zeros(config.num_kv_slots + 1, np.uint64)
        self.trees: dict[str, Tree] = {}
        self.finished: dict[str, Flow] = {}
        self.seen: dict[tuple[Segment, int], np.uint64] = {}
        """The key behind which each token was predicted, by segment and index."""
        self.num_steps = 0
        self.num_idle_steps = 0
        """In a row, without a token of the model's own."""

    # What the engine does

    def add(self, request: GenerationRequest, teacher: Teacher | None = None) -> None:
        assert len(request.prompt_ids) + request.max_new_tokens <= self.config.num_kv_slots
        flow = Flow(request, Grammar(SMALL), SMALL.eos, teacher)
        self.trees[request.request_id] = self.scheduler.submit(flow)

    def abort(self, request_id: str) -> None:
        tree = self.trees[request_id]
        tree.flow.finish = FinishReason.ABORTED
        if tree in self.scheduler.waiting:
            self.scheduler.drop_waiting(tree)
            self._end([tree])

    def preempt(self, request_id: str) -> None:
        tree = self.trees[request_id]
        if tree in self.scheduler.running and tree.flow.finish is None:
            self.scheduler.preempt(tree)
            self._spoil_free_slots()

    def start_again(self) -> None:
        self._end(self.scheduler.drop_finished())
        self.version += 1
        self.scheduler.start_again(self.version)

    def renew(self) -> None:
        self._end(self.scheduler.drop_finished())
        self.version += 1
        for feed in self.scheduler.renew(self.version):
            self._compute([], [feed])

    def keep(self) -> None:
        """New weights over old keys: what is decoded then depends on when they came."""
        self._end(self.scheduler.drop_finished())
        self.version += 1
        self.scheduler.enter(self.version)

    def step(self) -> None:
        scheduler = self.scheduler
        self._end(scheduler.drop_finished())
        oldest = scheduler.running[0] if scheduler.running else None
        plan = scheduler.plan()
        self._spoil_free_slots(plan.feeds)
        assert oldest is None or oldest in scheduler.running, "the oldest tree was suspended"
        self._check_plan(plan.streams, plan.feeds)
        states = self._compute(plan.streams, plan.feeds)
        accepted = False
        for stream in [*plan.streams, *(feed.sampled for feed in plan.feeds if feed.sampled)]:
            if stream.flow.finish is None:
                self._accept(stream, states[stream])
                accepted = True
        ended = scheduler.drop_finished()
        self._end(ended)
        self.num_steps += 1
        has_moved = accepted or ended or not self.trees
        self.num_idle_steps = 0 if has_moved else self.num_idle_steps + 1
        self.check()

    def drain(self) -> None:
        while self.trees:
            self.step()
        assert self.pool.num_slots - self.pool.num_free == self.scheduler.prefixes.idle_slots
        self.scheduler.prefixes.evict(self.pool.num_slots)
        assert (self.pool.num_free, self.pool.num_rows) == (self.pool.num_slots, 0)

    # What must hold

    def check(self) -> None:
        """Every row has an owner we know, and something moves."""
        scheduler, pool = self.scheduler, self.pool
        pool.check_integrity()
        scheduler.prefixes.check_integrity()
        running = scheduler.running
        rows = self._rows()
        assert len(rows) == len(set(rows)) == pool.num_rows
        users = sum(prefix.num_users for prefix in scheduler.prefixes.resident)
        assert users == len(running)
        for tree in scheduler.waiting:
            assert all(s.row == -1 for s in [tree.flow.trunk, *tree.flow.branches])
        for trees in (running, scheduler.waiting):
            assert [tree.age for tree in trees] == sorted(tree.age for tree in trees)
        assert {id(tree) for tree in self.trees.values()} == {
            id(tree) for tree in [*running, *scheduler.waiting]
        }
        # Everything in the pool may have to be computed anew, at 32 tokens per step at the least.
        assert self.num_idle_steps <= pool.num_slots // 32 + 3, "nothing moves any more"

    def _check_plan(self, streams: Sequence[Stream], feeds: Sequence[Feed]) -> None:
        sampled = [*streams, *(feed.sampled for feed in feeds if feed.sampled)]
        assert len(sampled) == len(set(sampled)) <= self.config.max_streams
        assert len(self.scheduler.running) <= self.config.max_running

    def _rows(self) -> list[int]:
        rows = [prefix.row for prefix in self.scheduler.prefixes.resident]
        for tree in self.scheduler.running:
            rows += [stream.row for stream in [tree.flow.trunk, *tree.flow.branches]]
        return rows

    # The model

    def _spoil_free_slots(self, feeds: Sequence[Feed] = ()) -> None:
        """What is not resident is lost, also where a slot comes back to who had it before."""
        pool = self.pool
        kept = [pool.read_own(row) for row in self._rows()] + [feed.readable for feed in feeds]
        is_free = np.ones(pool.num_slots + 1, np.bool_)
        is_free[np.concatenate([*kept, []]).astype(np.int64)] = False
        self.keys[is_free] = _STALE

    def _compute(self, streams: Sequence[Stream], feeds: Sequence[Feed]) -> dict[Stream, np.uint64]:
        """Write the keys of a pass; return the last one of every stream that takes a sample."""
        tokens: list[tuple[int, int, int, npt.NDArray[np.int32]]] = []
        if streams:
            slots = self.pool.append_one_each(np.array([stream.row for stream in streams]))
            for stream, slot in zip(streams, slots.tolist(), strict=True):
                segment, read = stream.segment, self.pool.read(stream.row)
                tokens.append((segment.position_ids[-1], segment.token_ids[-1], slot, read))
        for feed in feeds:
            for row, slot in enumerate(feed.slots.tolist()):
                read = feed.readable[feed.mask()[row]]
                assert slot in read.tolist()
                tokens.append((int(feed.position_ids[row]), int(feed.token_ids[row]), slot, read))
        written = [slot for _, _, slot, _ in tokens]
        assert len(written) == len(set(written)), "two tokens of a pass go to one slot"
        # In the order of positions every token comes behind those it reads.
        for position, token_id, slot, read in sorted(tokens, key=lambda token: token[:3]):
            self.keys[slot] = key_of(
                token_id, position, self.version, self.keys[read[read != slot]]
            )
        states = {s: self.keys[self.pool.read_own(s.row)[-1]] for s in streams}
        for feed in feeds:
            for row, (segment, index) in enumerate(feed.scored):
                self.seen[segment, index] = self.keys[feed.slots[row]]
            if feed.sampled is not None:
                states[feed.sampled] = self.keys[feed.slots[-1]]
        return states

    def _accept(self, stream: Stream, state: np.uint64) -> None:
        segment, flow = stream.segment, stream.flow
        token_id = None
        if flow.teacher is not None:
            token_id = flow.teacher(segment.block, segment.branch, stream.index)
        if token_id is None or token_id in WORDS:
            token_id = WORDS[int(state) % len(WORDS)]
        flow.accept(stream, token_id, -1.0, self.version)
        self.seen[segment, len(segment.token_ids) - 1] = state

    def _end(self, trees: Sequence[Tree]) -> None:
        for tree in trees:
            request_id = tree.flow.request.request_id
            del self.trees[request_id]
            self.finished[request_id] = tree.flow

    # The oracle

    def check_keys(self, flow: Flow) -> None:
        """Compare what predicted each token with a pass over the whole text, by the visibility rule
        alone.
        """
        text = flow.trajectory()
        own = [
            self.seen.get((segment, index))
            for segment in flow.segments
            for index in range(len(segment.token_ids))
        ]
        versions = {int(v) for v in text.weight_versions} - {-1}
        expected = {version: _keys_of_text(text, version) for version in versions}
        for index in range(text.prompt_length, len(text.token_ids)):
            if text.branch[index - 1] not in (0, text.branch[index]):
                # Nothing predicts <takeaway>, nor <step> of the second branch and later ones.
                assert own[index] is None
                continue
            version = int(text.weight_versions[index])
            assert own[index] == expected[version][index - 1], (index, flow.request.request_id)


def _keys_of_text(text: Trajectory, version: int) -> npt.NDArray[np.uint64]:
    mask = dense_mask(np.zeros_like(text.block), text.block, text.branch)
    keys = np.zeros(len(text.token_ids), np.uint64)
    for index in range(len(keys)):
        read = keys[:index][mask[index, :index]]
        keys[index] = key_of(
            int(text.token_ids[index]), int(text.position_ids[index]), version, read
        )
    return keys
