"""One trajectory as it grows: Map, Process, Reduce as pure code over token ids.

A flow holds the streams of one request: a trunk, and between fork and join its branches. It drives
the grammar (``schema``) and the places (``topology``), inserts what the structure dictates, charges
the ledger and decides when the trajectory ends. It runs no model and owns no memory, so every
backend uses it as it is. A backend repeats

    1. ``begin_round`` inserts the forced tokens that are due and says so as a :class:`Move`:
       streams to seal, branches to open, branches to join;
    2. the backend computes these, and one token for every other stream in ``decoding``;
    3. ``accept`` takes one sampled token per stream, in the order of the branches.

That is a *round*: each open stream takes one token. A backend may spread the computing of a round
over several passes; the tokens are accepted in the same order whatever it does, so budgets end at
the same token. The tokens of a move are to be computed in one pass, so that every token of a
trajectory carries a log-prob whenever it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from npr_megatron.engine.flow.ledger import Ledger, Usage
from npr_megatron.engine.flow.segment import Segment, linearise
from npr_megatron.records.randomness import branch_key
from npr_megatron.records.request import GenerationRequest, RefusalPolicy
from npr_megatron.records.trajectory import DecodeMode, FinishReason, RouteArray, Trajectory
from npr_megatron.schema.grammar import Grammar, State
from npr_megatron.schema.rules import Rule
from npr_megatron.topology.cursor import TopologyCursor

Teacher = Callable[[int, int, int], int | None]
"""(block, branch, index in that stream) -> token to take instead of the sampled one; None keeps the
sample.
"""

_SMALLEST_STEP_TOKENS = 3
"""Behind its header a branch needs a token of text, ``</step>`` and the newline."""


@dataclass(slots=True, eq=False)
class Stream:
    """A run of tokens decoded one after another: the trunk (0, 0) or a branch."""

    flow: Flow
    segment: Segment
    state: State
    key: int
    """Random stream of (request seed, block, branch)."""
    row: int = -1
    """Row of the backend's memory that holds its keys and values; -1 where there is none."""
    index: int = 0
    """Generated tokens of this stream so far, forced ones included."""

    def place(self, token_id: int, *, forced: bool, logprob: float, version: int) -> int:
        """Append a token, charge it, and return its position."""
        flow, segment = self.flow, self.segment
        if segment.branch:
            position = flow.cursor.advance_branch(segment.branch)
        else:
            position = flow.cursor.advance_trunk()
        segment.append(token_id, position, forced, logprob, version)
        self.index += 1
        flow.ledger.total += 1
        return position


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """Forced tokens that were placed and are to be computed; all of them in one pass.

    A fork seals the trunk and opens branches; a join seals the last branches and opens the trunk
    anew, behind what the ``joined`` streams hold.
    """

    sealed: list[Stream]
    """Their last two tokens, the sampled one and the newline behind it, are to be fed."""
    opened: list[tuple[Stream, int]]
    """Streams whose header, the last so many tokens, is to be fed; each then takes a sample."""
    joined: list[Stream]
    """Branches that end here, in order; empty unless this is a join."""


_NOTHING = Move([], [], [])


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
    segments: list[Segment] = field(init=False)
    """In order of creation: the trunk from the prompt on, branch 1, branch 2, ..., trunk."""
    draws_from_policy: bool = field(init=False)
    """Whether tokens are drawn from the full distribution at temperature 1."""
    _due: list[Stream] = field(default_factory=list)
    """Streams whose next token is dictated."""
    _fork_state: State = field(init=False)
    _is_plain: bool = field(init=False)
    """Whether tags are text like any other: in sequential mode, and behind a refusal."""

    def __post_init__(self) -> None:
        request = self.request
        prompt_length = len(request.prompt_ids)
        self.ledger = Ledger(prompt_length, request.max_new_tokens, request.max_critical_path)
        self.cursor = TopologyCursor(start=prompt_length)
        self.segments = [Segment.of_prompt(request.prompt_ids)]
        self._fork_state = self.grammar.start
        self._is_plain = request.mode is DecodeMode.SEQUENTIAL
        self.draws_from_policy = request.draws_from_policy
        key = branch_key(request.seed, 0, 0)
        self.trunk = Stream(self, self.segments[0], self.grammar.start, key)
        self.decoding = [self.trunk]

    @property
    def usage(self) -> Usage:
        """The three numbers of the ledger; a suspended flow holds no keys and values, but needs
        them.
        """
        prompt_length, total = len(self.request.prompt_ids), self.ledger.total
        num_unfed = len(self.decoding) + len(self._due)
        path = self.cursor.position - prompt_length
        return Usage(total, path, prompt_length + total - num_unfed)

    @property
    def is_due(self) -> bool:
        """Whether the next round begins with forced tokens."""
        return bool(self._due)

    @property
    def due(self) -> tuple[Stream, ...]:
        """Streams whose next token is dictated, in the order in which they came to it."""
        return tuple(self._due)

    @property
    def is_plain(self) -> bool:
        """Whether tags are text like any other: in sequential mode, and behind a refusal."""
        return self._is_plain

    @property
    def round_verdict(self) -> FinishReason | None:
        """Why the forced tokens that are due do not fit the budget; None where the next
        ``begin_round`` places them.
        """
        if not self._due:
            return None
        return self.ledger.verdict(*(self._seal_need() if self.branches else self._fork_need()))

    @property
    def num_tokens_due(self) -> int:
        """Tokens that the next round will feed at most."""
        num_tokens = len(self.decoding) + 2 * len(self._due)
        vocabulary = self.grammar.vocabulary
        if self._due and not self.branches:
            num_tokens += sum(map(len, self._headers()))
        elif self._due and not self.decoding:
            num_tokens += len(vocabulary.takeaway_header)
        # Forced tokens beyond the budget will not be placed: waiting for their slots could take
        # more than a pool that the request fits alone has.
        num_pending = len(self.decoding) + len(self._due)
        return min(num_tokens, num_pending + self.ledger.max_new_tokens - self.ledger.total)

    @property
    def num_samples_at_once(self) -> int:
        """Samples that the next round takes in one pass at least: a fork opens all its branches."""
        return self.trunk.state.num_plans if self._due and not self.branches else 1

    def anew(self) -> Flow:
        """Return the flow that starts the request again."""
        return Flow(self.request, self.grammar, self.eos, self.teacher)

    def begin_round(self, version: int) -> Move:
        """Insert the forced tokens that are due.

        Either all of them fit the budget, and the token sampled behind them too, or the trajectory
        ends (or goes on without a fork) before any is placed: never a partial fork.
        """
        if not self._due:
            return _NOTHING
        move = self._seal(self._due, version) if self.branches else self._fork(version)
        if self.finish is None:  # otherwise the last token of each is never fed
            self._due = []
        return move

    def accept(self, stream: Stream, token_id: int, logprob: float, version: int) -> bool:
        """Take the token sampled for ``stream``; decide whether it ends the stream or the
        trajectory.

        Returns:
            Whether another token was taken in its place, whose log-prob the caller must fill in.
        """
        if self._is_plain:
            position = stream.place(token_id, forced=False, logprob=logprob, version=version)
            if token_id == self.eos:
                self.finish = FinishReason.STOP
            else:
                self.finish = self.ledger.verdict(1, position + 2)
            return False
        state, rule = self.grammar.advance(stream.state, token_id)
        is_closed_by_force = rule is not None and self._must_close(stream)
        if is_closed_by_force:
            self.finish_detail = self.finish_detail or f"closed a step that broke {rule}"
            token_id, logprob = self.grammar.vocabulary.step_close, 0.0
            state, _ = self.grammar.advance(stream.state, token_id)
            rule = None
        stream.state = state
        position = stream.place(
            token_id, forced=is_closed_by_force, logprob=logprob, version=version
        )
        if rule is not None:
            self._refuse(stream, rule)
            if self.finish is not None:
                return False
        if state.is_terminal:
            self.finish = FinishReason.STOP
            return False
        self.finish = self.ledger.verdict(1, position + 2)
        if state.next_is_forced and not self._is_plain:
            self._due.append(stream)
            self.decoding = [other for other in self.decoding if other is not stream]
        return is_closed_by_force

    def trajectory(self, routed_experts: RouteArray | None = None) -> Trajectory:
        """Return the record of a finished flow: trunk, branch 1, branch 2, ..., trunk.

        Args:
            routed_experts: of its tokens, in this order.
        """
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
            routed_experts=routed_experts,
            **linearise(self.segments),
        )

    # Refusals

    def _must_close(self, stream: Stream) -> bool:
        """Return whether a branch that broke a rule is closed, and the others go on."""
        is_serving = self.request.on_refusal is RefusalPolicy.SEQUENTIAL
        return is_serving and stream.segment.branch > 0

    def _refuse(self, stream: Stream, rule: Rule) -> None:
        """The trunk broke a rule: end the trajectory, or go on as plain text."""
        if self.request.on_refusal is RefusalPolicy.TERMINATE:
            self.finish, self.finish_detail = FinishReason.MALFORMED, str(rule)
        else:
            self._go_on_plainly(str(rule))

    def _go_on_plainly(self, why: str) -> None:
        """Serve the rest of the trunk as sequential text; nothing was forked yet."""
        self._is_plain = True
        self.finish_detail = f"sequential from token {self.ledger.total} on: {why}"
        self.decoding = [self.trunk]

    # Map, Process, Reduce

    def _headers(self) -> list[tuple[int, ...]]:
        vocabulary = self.grammar.vocabulary
        return [vocabulary.step_header(index + 1) for index in range(self.trunk.state.num_plans)]

    def _fork_need(self) -> tuple[int, int]:
        """Return the tokens and the end position without which no fork is begun."""
        lengths = [len(header) + _SMALLEST_STEP_TOKENS for header in self._headers()]
        return 1 + sum(lengths), self.cursor.position + 1 + max(lengths)

    def _fork(self, version: int) -> Move:
        """Map: seal ``</guideline>`` with the separator and open every branch with its header."""
        vocabulary, trunk, headers = self.grammar.vocabulary, self.trunk, self._headers()
        refusal = self.ledger.verdict(*self._fork_need())
        if refusal is not None:
            if self.request.on_refusal is RefusalPolicy.TERMINATE:
                self.finish, self.finish_detail = refusal, "no room to fork"
                return _NOTHING
            self._go_on_plainly("no room to fork")
            return _NOTHING
        trunk.place(vocabulary.newline, forced=True, logprob=0.0, version=version)
        trunk.state, _ = self.grammar.advance(trunk.state, vocabulary.newline)
        self._fork_state = trunk.state
        self.cursor.fork(len(headers))
        self.branches = [self._open_branch(branch) for branch in range(1, len(headers) + 1)]
        for stream, header in zip(self.branches, headers, strict=True):
            for token_id in header:
                stream.place(token_id, forced=True, logprob=0.0, version=version)
        self.decoding = self.branches
        opened = [(stream, stream.index) for stream in self.branches]
        return Move(sealed=[trunk], opened=opened, joined=[])

    def _open_branch(self, branch: int) -> Stream:
        block = self.cursor.block
        segment = Segment(block, branch)
        self.segments.append(segment)
        state = self.grammar.branch_start(self._fork_state, branch)
        return Stream(self, segment, state, branch_key(self.request.seed, block, branch))

    def _seal_need(self) -> tuple[int, int]:
        """Return the tokens and the end position that the seals due take, a join included, and one
        sample behind them.
        """
        ends = [stream.segment.position_ids[-1] + 2 for stream in self._due]
        num_tokens = len(self._due) + 1
        if not self.decoding:
            num_header = len(self.grammar.vocabulary.takeaway_header)
            num_tokens += num_header
            ends.append(max([self.cursor.position, *ends]) + num_header + 1)
        return num_tokens, max(ends)

    def _seal(self, due: list[Stream], version: int) -> Move:
        """Process, Reduce: end each closed branch with its newline; behind the last one, join."""
        vocabulary = self.grammar.vocabulary
        is_join = not self.decoding
        self.finish = self.ledger.verdict(*self._seal_need())
        if self.finish is not None:
            return _NOTHING
        for stream in due:
            stream.place(vocabulary.newline, forced=True, logprob=0.0, version=version)
        if not is_join:
            return Move(sealed=due, opened=[], joined=[])
        joined = self._join(version)
        return Move(due, [(self.trunk, len(vocabulary.takeaway_header))], joined)

    def _join(self, version: int) -> list[Stream]:
        """Open the takeaway behind the furthest branch; return the branches that end here."""
        trunk, joined = self.trunk, self.branches
        self.branches = []
        self.cursor.join()
        trunk.segment = Segment(0, 0)
        self.segments.append(trunk.segment)
        trunk.state = self.grammar.after_join(self._fork_state)
        for token_id in self.grammar.vocabulary.takeaway_header:
            trunk.place(token_id, forced=True, logprob=0.0, version=version)
            trunk.state, _ = self.grammar.advance(trunk.state, token_id)
        self.decoding = [trunk]
        return joined
