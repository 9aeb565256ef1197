"""One flow on SGLang: which stages it needs, and what their answers mean for it.

Plain bookkeeping without waiting: :class:`Driver` is told what SGLang answered (:meth:`take`) and
tells a :class:`Desk` which stages to send or to abort. It does with a flow what every backend does
(``engine.flow.flow``), only that tokens arrive stream by stream instead of round by round:

- What a stage samples is kept per stream (:class:`Line`) and accepted in rounds: token i of every
  open branch, in the order of the branches. So every trajectory ends at the same token as in the
  embedded engine, however SGLang mixed its requests.
- Forced tokens are computed *before* the flow places them: a fork is sent as soon as it is known to
  fit, a closed branch is sealed at once, a join follows the last seal; ``begin_round`` is called
  when their log-probs are in. A flow therefore holds nothing unfinished whenever it is looked at:
  it can be told, aborted or carried over to new weights between any two answers.
- A *seal* computes ``</step>`` and its newline, which no sampling stage does: SGLang never computes
  keys and values of the token it stops at. That makes it unnecessary to keep SGLang from stopping.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum, auto
from types import MappingProxyType
from typing import Protocol

from npr_megatron.engine.flow.flow import Flow, Stream
from npr_megatron.engine.sglang.client.lines import Line, Received, Scores
from npr_megatron.engine.sglang.client.replay import replay
from npr_megatron.engine.sglang.client.routes import NUM_SHARED, RouteBook
from npr_megatron.engine.sglang.client.rows import Row, runs_of
from npr_megatron.engine.sglang.client.stages import (
    block_row,
    decode_stage,
    fork_row,
    seal_stage,
    trunk_row,
)
from npr_megatron.engine.sglang.client.stops import Stops
from npr_megatron.engine.sglang.stage import Stage, StageResult
from npr_megatron.errors import EnvironmentFault
from npr_megatron.records.request import RefusalPolicy
from npr_megatron.records.trajectory import FinishReason
from npr_megatron.schema.grammar import State


class Desk(Protocol):
    """Where stages are sent."""

    def send(self, life: str, stage: Stage) -> int:
        """Send a stage of a life; its answers come back under the returned number."""
        ...

    def abort(self, number: int) -> None:
        """Take no more answers of a stage."""
        ...


class _Kind(Enum):
    DECODE = auto()
    SEAL = auto()
    REPLAY = auto()


PLAIN = "the flow goes on plainly"
"""Why a life ends when a fork had no room: what follows is plain text, and must not be found under
the namespace of those that forked behind the same text."""


class Driver:
    """Drives one flow through one life: from admission to the end, or to the loss of what SGLang
    computed for it.

    Args:
        flow: as far as it has come in earlier lives.
        name: of this life's leases.
        namespace: of its keys and values; see ``Stage.namespace``.
        received: :attr:`left_over` of the life before.
        book: takes down which experts computed the tokens; None asks for none.
    """

    def __init__(
        self,
        flow: Flow,
        desk: Desk,
        stops: Stops,
        *,
        name: str,
        namespace: str,
        version: int,
        received: Mapping[int, Received] = MappingProxyType({}),
        book: RouteBook | None = None,
    ) -> None:
        self.flow = flow
        self.name = name
        self.ending = ""
        """Why this life is over although the flow is not; it goes on in another one."""
        self._desk = desk
        self._stops = stops
        self._book = book
        self._template = Stage(trajectory=name, namespace=namespace, token_ids=[], offset=0)
        self.version = version
        """Of the live weights."""
        self._open: dict[int, tuple[_Kind, Line | None]] = {}
        branches = {id(stream.segment) for stream in flow.branches}
        runs = runs_of([x for x in flow.segments if id(x) not in branches])
        self._waves = deque(replay(runs, self._template))
        self._lines = [
            Line(x.segment.branch, stream=x, received=deque(received.get(x.segment.branch, ())))
            for x in flow.branches or [flow.trunk]
        ]
        """The trunk, or the branches of the block, closed ones included."""
        self._joining: Line | None = None
        """The trunk behind the join, sent but not placed."""

    # What the engine calls

    def begin(self) -> None:
        """Send the first stages: what earlier lives computed, then what comes next."""
        flow = self.flow
        if not flow.branches and not flow.due:
            self._waves.pop()  # the trunk's next stage joins what is before it
        for line in self._lines:
            line.is_closed = line.stream not in flow.decoding
            self._judge(line)
        self._go_on()

    def take(self, number: int, answer: StageResult) -> None:
        """Take what SGLang answered to a stage, and send what follows from it."""
        kind, line = self._open[number]
        if answer.is_last:
            del self._open[number]
        if line is not None and kind is _Kind.DECODE:
            self._take_tokens(line, answer)
        if answer.refusal:
            self.ending = answer.refusal
            self.stop()
            return
        if line is not None and kind is _Kind.SEAL:
            self._take_seal(line, answer)
        self._go_on()

    def stop(self) -> None:
        """Abort all stages; nothing more is sent."""
        for number in self._open:
            self._desk.abort(number)
        self._open.clear()
        self._waves.clear()

    @property
    def left_over(self) -> dict[int, Received]:
        """What branches of the flow have sampled beyond what was accepted, by branch."""
        return {x.branch: x.received for x in self._lines if x.stream in self.flow.branches}

    # Answers

    def _take_tokens(self, line: Line, answer: StageResult) -> None:
        if line.stream is None and line.header_scores is None:
            line.header_scores = Scores(answer.scored, answer.scored_version)
        line.received.extend(
            zip(answer.token_ids, answer.logprobs, answer.weight_versions, strict=True)
        )
        line.num_in_stage += len(answer.token_ids)
        if not answer.is_last:
            return
        if self._book is not None and answer.routes is not None and not answer.refusal:
            self._book.take(line.branch, answer.routes)
        if not line.num_in_stage and not answer.refusal:
            raise EnvironmentFault(
                f"SGLang was asked for the next tokens of branch {line.branch} of "
                f"{self.flow.request.request_id} and ended the request without any; the plugin or "
                "SGLang is at fault, start the engine anew"
            )
        line.stage, line.has_paused = None, True
        self._judge(line)

    def _take_seal(self, line: Line, answer: StageResult) -> None:
        line.stage, line.is_sealed = None, True
        if line.seal_scores is None:
            line.seal_scores = Scores(answer.scored, answer.scored_version)

    def _judge(self, line: Line) -> None:
        """Find out whether the tokens received close a branch, and how."""
        if not line.branch or not line.received:
            return
        flow, grammar = self.flow, self.flow.grammar
        state, rule = self._state(line), None
        for token_id, _, _ in line.received:
            state, rule = grammar.advance(state, token_id)
        line.is_closed = rule is not None or state.next_is_forced
        line.is_forced = rule is not None and flow.request.on_refusal is RefusalPolicy.SEQUENTIAL
        line.is_broken = rule is not None and not line.is_forced

    def _state(self, line: Line) -> State:
        """Return the state of a branch behind what was accepted."""
        if line.stream is not None:
            return line.stream.state
        grammar = self.flow.grammar
        fork, _ = grammar.advance(self.flow.trunk.state, grammar.vocabulary.newline)
        return grammar.branch_start(fork, line.branch)

    # Rounds

    def _go_on(self) -> None:
        flow = self.flow
        if any(kind is _Kind.REPLAY for kind, _ in self._open.values()):
            return
        if self._waves:
            for stage in self._waves.popleft():
                self._send(stage, _Kind.REPLAY, None)
            return
        while flow.finish is None and not self.ending and self._round():
            pass
        if flow.finish is None and not self.ending:
            self._send_missing()
        else:
            self.stop()

    def _round(self) -> bool:
        """Place the forced tokens that are due, or accept one token per open stream; return whether
        everything needed was there.
        """
        flow = self.flow
        if flow.due:
            return self._place()
        lines = [line for line in self._lines if line.stream in flow.decoding]
        if not all(line.is_ready for line in lines):
            return False
        for line in lines:
            self._accept(line)
            if flow.finish is not None:
                break
        return True

    def _accept(self, line: Line) -> None:
        token_id, logprob, version = line.received.popleft()
        stream = line.stream
        assert stream is not None, "a header is placed before its line's tokens are accepted"
        if not math.isfinite(logprob):
            self._fail(version)
        elif self.flow.accept(stream, token_id, logprob, version):
            assert line.seal_scores is not None, "a forced end waits for its log-prob"
            if line.seal_scores.is_finite:
                _record(stream, -1, line.seal_scores.logprobs[0], line.seal_scores.version)
            else:
                self._fail(line.seal_scores.version)

    def _fail(self, version: int) -> None:
        self.flow.finish = FinishReason.FAILED
        self.flow.finish_detail = f"log-probs under weight version {version} are NaN"

    # Forced tokens

    def _place(self) -> bool:
        """Have the flow place what is due once it is computed; return whether it was."""
        flow = self.flow
        if flow.round_verdict is not None:
            flow.begin_round(self.version)
            if flow.finish is None:
                self.ending = PLAIN
            return True
        if not flow.branches:
            return self._place_fork()
        if not flow.decoding:
            return self._place_join()
        return self._place_newlines()

    def _place_fork(self) -> bool:
        flow = self.flow
        if self._lines[0].branch == 0:
            if self._lines[0].stage is None:  # its lease is taken when it ends
                self._send_fork()
            return False
        scores = self._known([line.header_scores for line in self._lines])
        if scores is None:
            return False
        flow.begin_round(self.version)
        _record(flow.trunk, -1, scores[0].logprobs[0], scores[0].version)
        for line, stream, known in zip(self._lines, flow.branches, scores, strict=True):
            # Nothing predicts <step> but in the first branch.
            first = known.logprobs[1] if line.branch == 1 else 0.0
            self._record_header(line, stream, Scores([first, *known.logprobs[2:]], known.version))
        return True

    def _send_fork(self) -> None:
        flow, row = self.flow, fork_row(self.flow)
        step_header = flow.grammar.vocabulary.step_header
        branches = range(1, flow.trunk.state.num_plans + 1)
        self._lines = [Line(branch, header=step_header(branch)) for branch in branches]
        for line in self._lines:
            self._send_decode(line, row)

    def _place_newlines(self) -> bool:
        """Place the newlines of some branches while others go on."""
        due = [line for line in self._lines if line.stream in self.flow.due]
        if self._known([line.seal_scores for line in due]) is None:
            return False
        self.flow.begin_round(self.version)
        self._record_newlines(due)
        return True

    def _place_join(self) -> bool:
        flow = self.flow
        joining = self._joining
        if joining is None:
            if all(line.is_sealed for line in self._lines):
                header = flow.grammar.vocabulary.takeaway_header
                self._joining = Line(0, header=header)
                self._send_decode(self._joining, block_row(flow))
            return False
        due = [line for line in self._lines if line.stream in flow.due]
        known = self._known([joining.header_scores, *(line.seal_scores for line in due)])
        if known is None:
            return False
        flow.begin_round(self.version)
        self._record_newlines(due)
        # Nothing predicts the first token behind a join.
        scores = Scores([0.0, *known[0].logprobs], known[0].version)
        self._record_header(joining, flow.trunk, scores)
        self._lines, self._joining = [joining], None
        return True

    def _known(self, scores: Sequence[Scores | None]) -> list[Scores] | None:
        """Return ``scores`` if all are there and finite; where one is not finite the flow ends."""
        known = [x for x in scores if x is not None]
        for x in known:
            if not x.is_finite:
                self._fail(x.version)
        return known if len(known) == len(scores) and self.flow.finish is None else None

    def _record_newlines(self, lines: Sequence[Line]) -> None:
        for line in lines:
            assert line.stream is not None and line.seal_scores is not None, "placed when known"
            _record(line.stream, -1, line.seal_scores.logprobs[-1], line.seal_scores.version)

    def _record_header(self, line: Line, stream: Stream, scores: Scores) -> None:
        """Bind a line to the stream that was opened for it."""
        line.stream = stream
        for index, logprob in enumerate(scores.logprobs[: len(line.header)]):
            _record(stream, index, logprob, scores.version)

    # Stages

    def _send_missing(self) -> None:
        """Send what streams need and no stage under way will bring."""
        missing = [line for line in self._lines if self._is_missing(line)]
        if not missing:
            return
        # A branch may close before its siblings have begun, and so before the fork is placed.
        is_placed = all(line.stream is not None for line in missing)
        row = trunk_row(self.flow) if is_placed else fork_row(self.flow)
        vocabulary = self.flow.grammar.vocabulary
        for line in missing:
            if line.is_closed:
                stage = seal_stage(line, row, self._template, vocabulary)
                line.stage = self._send(stage, _Kind.SEAL, line)
            else:
                self._send_decode(line, row)

    def _is_missing(self, line: Line) -> bool:
        if line.stage is not None:
            return False
        if line.is_closed:
            return line.branch > 0 and not (line.is_sealed or line.is_broken)
        is_asked = line.stream in self.flow.decoding
        return is_asked and not (line.received and line.has_paused)

    def _send_decode(self, line: Line, row: Row) -> None:
        stage = decode_stage(self.flow, line, row, self._template, self._stops)
        if self._book is not None:
            routes_from = len(row.token_ids) - NUM_SHARED if line.branch else 0
            stage = replace(stage, routes_from=routes_from)
        if stage.max_new_tokens > 0:
            line.has_paused, line.num_in_stage = False, 0
            line.stage = self._send(stage, _Kind.DECODE, line)

    def _send(self, stage: Stage, kind: _Kind, line: Line | None) -> int:
        number = self._desk.send(self.name, stage)
        self._open[number] = (kind, line)
        return number


def _record(stream: Stream, index: int, logprob: float, version: int) -> None:
    """Note how likely a forced token of a stream's segment was."""
    stream.segment.logprobs[index] = logprob
    stream.segment.weight_versions[index] = version
