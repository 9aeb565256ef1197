"""Token ids to a :class:`Document`, whole or streaming, with every violation on the way.

Spans index the response ids. A document exists only for a response without violation; the blocks of
a broken one are a best effort (complete blocks only) that the score counts with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from npr_megatron.schema.grammar import LEADS_TO, Grammar, Phase, State
from npr_megatron.schema.rules import Rule, Violation
from npr_megatron.schema.tags import Tag, Vocabulary

_TEXT_PHASES = frozenset({Phase.PLAN_TEXT, Phase.STEP_TEXT, Phase.TAKEAWAY_TEXT})


class Span(NamedTuple):
    """Half-open range of response indices."""

    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        """Length; 0 for an empty text."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One guideline with its steps and takeaway.

    Example, ``<guideline> NL <plan> 1: a </plan> NL </guideline> NL <step> NL 1: b </step> NL
    <takeaway> NL c </takeaway>`` with one id per word::

        guideline=(0, 8)  plans=((4, 5),)  steps=((12, 13),)  takeaway=(17, 18)  branches=((9, 15),)
    """

    guideline: Span
    """``<guideline>`` to ``</guideline>``, both included."""
    plans: tuple[Span, ...]
    """Text of each plan, without tags and index."""
    steps: tuple[Span, ...]
    """Text of each step, without tags and index."""
    takeaway: Span
    """Text of the takeaway, without tags and leading newline."""

    @property
    def branches(self) -> tuple[Span, ...]:
        """``<step>`` to the newline behind ``</step>``, of each branch; holds in documents only."""
        borders = [self.guideline.stop + 1, *(step.stop + 2 for step in self.steps)]
        return tuple(Span(*pair) for pair in pairwise(borders))

    @property
    def extent(self) -> Span:
        """``<guideline>`` to ``</takeaway>``, both included."""
        return Span(self.guideline.start, self.takeaway.stop + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A well-formed response."""

    blocks: tuple[Block, ...]
    """At least one."""
    conclusion: Span
    """Text behind the last block, without its separator newline and the end token."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the response, end-of-sequence token included."""
        return self.conclusion.stop + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ParseResult:
    """What a response turned out to be."""

    blocks: tuple[Block, ...]
    """Complete blocks; a best effort where there are violations."""
    conclusion: Span | None
    """What follows the last block up to the end; None where the response ends inside a block."""
    violations: tuple[Violation, ...]
    """In order of position. Equal ones at neighbouring tokens are reported once, at the first."""

    @property
    def document(self) -> Document | None:
        """The document, None if any rule is broken."""
        if self.violations or self.conclusion is None:
            return None
        return Document(blocks=self.blocks, conclusion=self.conclusion)


def parse(response_ids: Iterable[int], vocabulary: Vocabulary) -> ParseResult:
    """Parse a whole response; broken ones never raise."""
    parser = Parser(Grammar(vocabulary))
    for token_id in response_ids:
        parser.feed(int(token_id))
    return parser.result()


@dataclass(slots=True)
class _OpenBlock:
    start: int
    guideline_stop: int | None = None
    plans: list[Span] = field(default_factory=list[Span])
    steps: list[Span] = field(default_factory=list[Span])


class Parser:
    """Parses a response as it grows. Parsers may share a grammar.

    Example::

        parser = Parser(grammar)
        rule = parser.feed(token_id)    # None while the stream is legal
        parser.result()                 # at any time: as if the stream ended here
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._tags = grammar.vocabulary.tags
        self._position = 0
        self._stop: int | None = None  # where the end-of-sequence token stands
        self._state = grammar.start
        self._violations: list[Violation] = []
        self._run: tuple[Rule | None, int] = (None, -1)  # last broken rule and where
        self._blocks: list[Block] = []
        self._open: _OpenBlock | None = None
        self._text_start: int | None = None
        self._conclusion_start: int | None = None

    @property
    def state(self) -> State:
        """Where the stream stands."""
        return self._state

    def feed(self, token_id: int) -> Rule | None:
        """Read one id; return the rule it breaks, None where it is legal."""
        before = self._state
        self._state, rule = self._grammar.advance(before, token_id)
        if rule is not None:
            self._report(rule)
        tag = self._tags.get(token_id)
        if tag is None:
            self._read_text(before, self._state, rule)
        elif self._state.phase is LEADS_TO[tag]:  # else it was skipped
            self._read_tag(tag, rule)
        self._position += 1
        return rule

    def result(self) -> ParseResult:
        """Return what the stream is if it ends here."""
        violations = list(self._violations)
        rule = self._grammar.end_rule(self._state)
        if rule is not None:
            violations.append(Violation(self._position, rule))
        conclusion = None
        if self._conclusion_start is not None:
            stop = self._position if self._stop is None else self._stop
            conclusion = Span(self._conclusion_start, stop)
        return ParseResult(
            blocks=tuple(self._blocks), conclusion=conclusion, violations=tuple(violations)
        )

    def _report(self, rule: Rule) -> None:
        if self._run != (rule, self._position - 1):
            self._violations.append(Violation(self._position, rule))
        self._run = (rule, self._position)

    def _read_text(self, before: State, after: State, rule: Rule | None) -> None:
        if after.phase in _TEXT_PHASES:
            # Headers end in a text phase too: the last id of "i:", the newline behind <takeaway>.
            is_header = before.phase is not after.phase and rule is None
            if self._text_start is None and not is_header:
                self._text_start = self._position
        elif after.phase is Phase.BLOCK_END_LINE:
            self._conclusion_start = self._position + 1
        elif after.phase is Phase.END and self._stop is None:
            self._stop = self._position

    def _read_tag(self, tag: Tag, rule: Rule | None) -> None:
        position, block = self._position, self._open
        start = position if self._text_start is None else self._text_start
        text = Span(start, position)
        self._text_start = None
        if tag is Tag.GUIDELINE_OPEN:
            self._open = _OpenBlock(position)
            self._conclusion_start = None
        elif block is None:
            return
        elif tag is Tag.GUIDELINE_CLOSE:
            block.guideline_stop = position + 1
        elif tag is Tag.TAKEAWAY_CLOSE:
            self._open = None
            self._conclusion_start = position + 1
            if _closes_text(rule):
                self._complete(block, text)
        elif tag is Tag.PLAN_CLOSE and _closes_text(rule):
            block.plans.append(text)
        elif tag is Tag.STEP_CLOSE and _closes_text(rule):
            block.steps.append(text)

    def _complete(self, block: _OpenBlock, takeaway: Span) -> None:
        if block.guideline_stop is None:
            return
        self._blocks.append(
            Block(
                guideline=Span(block.start, block.guideline_stop),
                plans=tuple(block.plans),
                steps=tuple(block.steps),
                takeaway=takeaway,
            )
        )


def _closes_text(rule: Rule | None) -> bool:
    return rule is None or rule is Rule.EMPTY_TEXT
