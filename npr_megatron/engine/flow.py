"""One trajectory as it grows: Map, Process, Reduce as pure code.

A flow holds the streams of one request: a trunk, and between fork and join its branches. It drives
the grammar (``schema``) and the places (``topology``), inserts what the structure dictates, charges
the ledger and decides when the trajectory ends. It runs no model: per engine step,

    1. ``expand`` inserts forced tokens where they are due and returns them as feeds, together with
       the sampled token each of them follows: one ragged step seals a stream, forks it, or joins
       it;
    2. the engine feeds these, and one token for every other stream in ``decoding``;
    3. ``accept`` takes one sampled token per stream that was asked for one, in the order of the
       branches.

A forced token is placed in the same step that computes its log-prob, so every token of a trajectory
carries one whenever it ends. A stream's last sampled token is always the only one whose keys and
values are not yet in the pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from npr_megatron.engine.ledger import Ledger
from npr_megatron.engine.pool import SlotPool
from npr_megatron.engine.segment import Feed, Segment, linearise
from npr_megatron.records.randomness import branch_key
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from npr_megatron.schema.grammar import Grammar, State
from npr_megatron.topology.cursor import TopologyCursor

Teacher = Callable[[int, int, int], int | None]
"""(block, branch, index in that stream) -> token to take instead of the sampled one; None keeps the
sample.
"""


@dataclass(slots=True, eq=False)
class Stream:
    """A run of tokens decoded through one pool row: the trunk (0, 0) or a branch."""

    flow: Flow
    row: int
    segment: Segment
    state: State
    key: int
    """Random stream of (request seed, block, branch)."""
    index: int = 0
    """Generated tokens of this stream so far, forced ones included."""

    def place(self, token_id: int, *, forced: bool, logprob: float, version: int) -> int:
        """Append a token, charge it, and return its position."""
        flow, segment = self.flow, self.segment
        if segment.branch:
            position = flow.cursor.place_branch(segment.branch).position
        else:
            position = flow.cursor.place_trunk().position
        segment.append(token_id, position, forced, logprob, version)
        self.index += 1
        flow.ledger.charge()
        return position


@dataclass(slots=True, eq=False)
class Flow:
    """The state of one request from admission to its end.

    Args:
        request: what to decode.
        grammar: the tag language; used in parallel mode only.
        eos: end token of sequential mode.
        teacher: overrides sampled tokens (tests, benchmarks, replays of a known trajectory).
    """

    request: GenerationRequest
    grammar: Grammar
    eos: int
    teacher: Teacher | None = None
    finish: FinishReason | None = None
    finish_detail: str = ""
    decoding: list[Stream] = field(default_factory=list)
    """Streams with one sampled token to feed, in branch order. Rebound, never mutated."""
    ledger: Ledger = field(init=False)
    cursor: TopologyCursor = field(init=False)
    trunk: Stream = field(init=False)
    branches: list[Stream] = field(default_factory=list)
    """Streams between fork and join, closed ones included."""
    _segments: list[Segment] = field(init=False)
    _due: list[Stream] = field(default_factory=list)
    """Streams whose next token is dictated."""
    _fork_state: State = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        prompt_length = len(request.prompt_ids)
        self.ledger = Ledger(prompt_length, request.max_new_tokens, request.max_critical_path)
        self.cursor = TopologyCursor(start=prompt_length)
        self._segments = [Segment.of_prompt(request.prompt_ids)]
        self._fork_state = self.grammar.start

    @property
    def num_reserved(self) -> int:
        """Slots the flow may come to own: all it may generate and the last prompt token."""
        return self.request.max_new_tokens + 1

    @property
    def capacity(self) -> int:
        """Longest row the flow may come to need."""
        return len(self.request.prompt_ids) + self.request.max_new_tokens

    def start(self, pool: SlotPool, prefix_row: int) -> None:
        """Open the trunk on the row of the prompt's other tokens; the last one is fed by the first
        step.
        """
        row = pool.open_row(prefix_row, self.capacity)
        key = branch_key(self.request.seed, 0, 0)
        self.trunk = Stream(self, row, self._segments[0], self.grammar.start, key)
        self.decoding = [self.trunk]

    def anew(self) -> Flow:
        """Return the flow that starts the request again."""
        return Flow(self.request, self.grammar, self.eos, self.teacher)

    def release(self, pool: SlotPool) -> None:
        """Give every slot of the flow back."""
        for branch in self.branches:
            pool.close(branch.row)
        pool.close(self.trunk.row)

    def accept(self, stream: Stream, token_id: int, logprob: float, version: int) -> None:
        """Take the token sampled for ``stream``; decide whether it ends the stream or the
        trajectory.
        """
        position = stream.place(token_id, forced=False, logprob=logprob, version=version)
        if self.request.mode is DecodeMode.SEQUENTIAL:
            is_last, is_forced_next = token_id == self.eos, False
        else:
            state, rule = self.grammar.advance(stream.state, token_id)
            stream.state = state
            if rule is not None:
                self.finish, self.finish_detail = FinishReason.MALFORMED, str(rule)
                return
            is_last, is_forced_next = state.is_terminal, state.next_is_forced
        if is_last:
            self.finish = FinishReason.STOP
            return
        self.finish = self.ledger.verdict(1, position + 2)
        if is_forced_next:
            self._due.append(stream)
            self.decoding = [other for other in self.decoding if other is not stream]

    def expand(self, pool: SlotPool, version: int) -> list[Feed]:
        """Insert the forced tokens that are due and return what to feed for them.

        Either all of them fit the budget, and the token sampled behind them too, or the trajectory
        ends before any is placed.
        """
        if not self._due:
            return []
        due, self._due = self._due, []
        return self._seal(due, pool, version) if self.branches else self._fork(pool, version)

    def _fork(self, pool: SlotPool, version: int) -> list[Feed]:
        """Map: seal ``</guideline>`` with the separator and open every branch with its header."""
        vocabulary, trunk = self.grammar.vocabulary, self.trunk
        num_branches = trunk.state.num_plans
        headers = [vocabulary.step_header(index + 1) for index in range(num_branches)]
        lengths = [len(header) for header in headers]
        num_tokens, end = 1 + sum(lengths), self.cursor.position + 1 + max(lengths)
        self.finish = self.ledger.verdict(num_tokens + 1, end + 1)
        if self.finish is not None:
            return []
        trunk.place(vocabulary.newline, forced=True, logprob=0.0, version=version)
        trunk.state, _ = self.grammar.advance(trunk.state, vocabulary.newline)
        self._fork_state = trunk.state
        self.cursor.fork(num_branches)
        seal = Feed.of_tail(trunk.segment, 2, trunk.row, pool)
        for branch, header in enumerate(headers, start=1):
            stream = self._open_branch(branch, pool)
            for token_id in header:
                stream.place(token_id, forced=True, logprob=0.0, version=version)
        self.decoding = self.branches
        opened = [
            Feed.of_tail(stream.segment, len(header), stream.row, pool, sampled=stream)
            for stream, header in zip(self.branches, headers, strict=True)
        ]
        # The separator predicts <step> of the first branch; nothing predicts it in the others.
        seal.scored.append((self.branches[0].segment, 0))
        return [seal, *opened]

    def _open_branch(self, branch: int, pool: SlotPool) -> Stream:
        block = self.cursor.block
        stream = Stream(
            flow=self,
            row=pool.open_row(self.trunk.row, self.capacity),
            segment=Segment(block, branch),
            state=self.grammar.branch_start(self._fork_state, branch),
            key=branch_key(self.request.seed, block, branch),
        )
        self.branches = [*self.branches, stream]
        self._segments.append(stream.segment)
        return stream

    def _seal(self, due: list[Stream], pool: SlotPool, version: int) -> list[Feed]:
        """Process, Reduce: end each closed branch with its newline; behind the last one, join."""
        vocabulary = self.grammar.vocabulary
        is_join = not self.decoding
        ends = [stream.segment.position_ids[-1] + 2 for stream in due]
        num_tokens = len(due)
        if is_join:
            num_tokens += len(vocabulary.takeaway_header)
            furthest = max([self.cursor.position, *ends])
            ends.append(furthest + len(vocabulary.takeaway_header) + 1)
        self.finish = self.ledger.verdict(num_tokens + 1, max(ends))
        if self.finish is not None:
            return []
        feeds = []
        for stream in due:
            stream.place(vocabulary.newline, forced=True, logprob=0.0, version=version)
            feeds.append(Feed.of_tail(stream.segment, 2, stream.row, pool))
        return [*feeds, self._join(pool, version)] if is_join else feeds

    def _join(self, pool: SlotPool, version: int) -> Feed:
        """Let the trunk take over the branches' slots and open the takeaway behind the furthest
        branch.
        """
        trunk, header = self.trunk, self.grammar.vocabulary.takeaway_header
        pool.absorb(trunk.row, [branch.row for branch in self.branches])
        self.branches = []
        self.cursor.join()
        trunk.segment = Segment(0, 0)
        self._segments.append(trunk.segment)
        trunk.state = self.grammar.after_join(self._fork_state)
        for token_id in header:
            trunk.place(token_id, forced=True, logprob=0.0, version=version)
            trunk.state, _ = self.grammar.advance(trunk.state, token_id)
        self.decoding = [trunk]
        return Feed.of_tail(trunk.segment, len(header), trunk.row, pool, sampled=trunk)

    def refill(self, pool: SlotPool) -> Feed:
        """Return the feed that recomputes, in place, the keys and values of every token fed so far.

        The prompt's tokens but the last live in the prompt's own row and are left out.
        """
        live = [branch.segment for branch in self.branches]
        joined = [segment for segment in self._segments if segment not in live]
        trunk_slots = pool.read(self.trunk.row)
        parts = [(linearise(joined), trunk_slots)]
        parts += [
            (linearise([branch.segment]), pool.read_own(branch.row)) for branch in self.branches
        ]
        streams = {
            name: np.concatenate([part[name][: len(slots)] for part, slots in parts])
            for name in ("token_ids", "position_ids", "block", "branch")
        }
        slots = np.concatenate([slots for _, slots in parts])
        return Feed.of_tree(streams, slots, len(self.request.prompt_ids) - 1)

    def trajectory(self) -> Trajectory:
        """Return the record of a finished flow: trunk, branch 1, branch 2, ..., trunk."""
        if self.finish is None:
            raise AssertionError(f"the trajectory of {self.request.request_id} has not ended")
        request = self.request
        return Trajectory(
            prompt_id=request.prompt_id,
            rollout=request.rollout,
            mode=request.mode,
            prompt_length=len(request.prompt_ids),
            finish=self.finish,
            finish_detail=self.finish_detail,
            **linearise(self._segments),
        )
