"""The one automaton of the tag language, on token ids.

Parser, engine, layout and reward all step this grammar, so they cannot disagree about what a legal
response is::

    response   := block+ conclusion eos
    block      := guideline NL step (NL step)* NL takeaway NL?
    guideline  := <guideline> NL plan (NL plan)* NL </guideline>
    plan       := <plan> index text </plan>          index = "1:", "2:", ... up to max_plans
    step       := <step> NL index text </step>       as many as plans, in their order
    takeaway   := <takeaway> NL text </takeaway>
    conclusion := text                               text = no tag, no eos, not only blanks

After a violation the automaton goes on as well as it can: a tag inside a text is skipped unless it
opens a later part, any other misplaced tag inside a block leads where that tag always leads, and
what else is misplaced is skipped. Blocks do not nest. Whether the conclusion holds a boxed answer
is a question about text and belongs to ``schema.score``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from npr_megatron.schema.rules import Rule
from npr_megatron.schema.tags import Tag, Vocabulary


class Phase(StrEnum):
    """What is due next. The value names the place just reached."""

    START = "start"  # <guideline>
    GUIDELINE_LINE = "guideline line"  # newline, after <guideline> or </plan>
    GUIDELINE = "guideline"  # <plan> or </guideline>
    PLAN_INDEX = "plan index"  # the next id of "i:"
    PLAN_TEXT = "plan text"  # text or </plan>
    FORK_LINE = "fork line"  # newline, after </guideline>
    BRANCHES = "branches"  # <step>, or <takeaway> once every plan has its step
    STEP_LINE = "step line"  # newline, after <step>
    STEP_INDEX = "step index"  # the next id of "i:"
    STEP_TEXT = "step text"  # text or </step>
    STEP_END_LINE = "step end line"  # newline, after </step>; it belongs to the branch
    TAKEAWAY_LINE = "takeaway line"  # newline, after <takeaway>
    TAKEAWAY_TEXT = "takeaway text"  # text or </takeaway>
    BLOCK_END = "block end"  # newline, <guideline> or the conclusion
    BLOCK_END_LINE = "block end line"  # <guideline> or the conclusion
    CONCLUSION = "conclusion"  # text or eos
    END = "end"  # nothing


_BRANCH_PHASES = frozenset(
    {Phase.STEP_LINE, Phase.STEP_INDEX, Phase.STEP_TEXT, Phase.STEP_END_LINE}
)
_FORCED_PHASES = frozenset(
    {
        Phase.FORK_LINE,
        Phase.BRANCHES,
        Phase.STEP_LINE,
        Phase.STEP_INDEX,
        Phase.STEP_END_LINE,
        Phase.TAKEAWAY_LINE,
    }
)
_AFTER_LINE = {
    Phase.GUIDELINE_LINE: Phase.GUIDELINE,
    Phase.FORK_LINE: Phase.BRANCHES,
    Phase.STEP_LINE: Phase.STEP_INDEX,
    Phase.STEP_END_LINE: Phase.BRANCHES,
    Phase.TAKEAWAY_LINE: Phase.TAKEAWAY_TEXT,
}
_TEXT_OF_INDEX = {Phase.PLAN_INDEX: Phase.PLAN_TEXT, Phase.STEP_INDEX: Phase.STEP_TEXT}
_OUTSIDE = frozenset(
    {Phase.START, Phase.BLOCK_END, Phase.BLOCK_END_LINE, Phase.CONCLUSION, Phase.END}
)
_CLOSER = {
    Phase.PLAN_INDEX: Tag.PLAN_CLOSE,
    Phase.PLAN_TEXT: Tag.PLAN_CLOSE,
    Phase.STEP_INDEX: Tag.STEP_CLOSE,
    Phase.STEP_TEXT: Tag.STEP_CLOSE,
    Phase.TAKEAWAY_TEXT: Tag.TAKEAWAY_CLOSE,
}
_LATER_PARTS = {
    Phase.PLAN_INDEX: {Tag.PLAN_OPEN, Tag.GUIDELINE_CLOSE, Tag.STEP_OPEN, Tag.TAKEAWAY_OPEN},
    Phase.PLAN_TEXT: {Tag.PLAN_OPEN, Tag.GUIDELINE_CLOSE, Tag.STEP_OPEN, Tag.TAKEAWAY_OPEN},
    Phase.STEP_INDEX: {Tag.STEP_OPEN, Tag.TAKEAWAY_OPEN},
    Phase.STEP_TEXT: {Tag.STEP_OPEN, Tag.TAKEAWAY_OPEN},
    Phase.TAKEAWAY_TEXT: set[Tag](),
}
_RESIDUE = {
    Phase.START: Rule.TEXT_OUTSIDE_BLOCK,
    Phase.GUIDELINE: Rule.TEXT_IN_GUIDELINE,
    Phase.BRANCHES: Rule.TEXT_BETWEEN_STEPS,
}
LEADS_TO = {
    Tag.GUIDELINE_OPEN: Phase.GUIDELINE_LINE,
    Tag.GUIDELINE_CLOSE: Phase.FORK_LINE,
    Tag.PLAN_OPEN: Phase.PLAN_INDEX,
    Tag.PLAN_CLOSE: Phase.GUIDELINE_LINE,
    Tag.STEP_OPEN: Phase.STEP_LINE,
    Tag.STEP_CLOSE: Phase.STEP_END_LINE,
    Tag.TAKEAWAY_OPEN: Phase.TAKEAWAY_LINE,
    Tag.TAKEAWAY_CLOSE: Phase.BLOCK_END,
}
"""The phase behind each tag, unless the tag is skipped."""


class State(NamedTuple):
    """Where a stream stands. A tuple, because its hash is taken once per token.

    Example, inside the text of the second of three steps::

        State(Phase.STEP_TEXT, num_plans=3, step_index=2, has_text=True)
    """

    phase: Phase
    num_plans: int = 0
    """Plans opened in the current block; the number of branches once the guideline is closed."""
    step_index: int = 0
    """Steps opened in the current block: the 1-based number of an open one."""
    index_offset: int = 0
    """Ids of "i:" already read."""
    has_text: bool = False
    """A token that is not blank has been read in the current text, legal or not."""

    @property
    def in_branch(self) -> bool:
        """Whether the next token still belongs to the open step (its closing newline included)."""
        return self.phase in _BRANCH_PHASES

    @property
    def at_fork(self) -> bool:
        """Whether the separator newline has just been read: every branch opens from here."""
        return self.phase is Phase.BRANCHES and self.step_index == 0

    @property
    def at_join(self) -> bool:
        """Whether the last step has just been closed: the takeaway is due."""
        return self.phase is Phase.BRANCHES and self.step_index == self.num_plans > 0

    @property
    def next_is_forced(self) -> bool:
        """Whether the structure alone decides the next token, so an engine inserts it."""
        return self.phase in _FORCED_PHASES

    @property
    def is_terminal(self) -> bool:
        """Whether the end-of-sequence token has been read."""
        return self.phase is Phase.END


_Step = tuple[State, Rule | None]
_TEXT = -1  # any id without a role
_BLANK = -2  # any white space id except the newline


class Grammar:
    """Steps the automaton. Cheap per token: two dictionary look-ups; states are finitely many.

    Whole responses::

        state = grammar.start
        state, rule = grammar.advance(state, token_id)     # rule is None where the token is legal

    Branches on their own (native parallel decoding)::

        fork = state                                       # state.at_fork
        branch = grammar.branch_start(fork, 2)             # after the header of step 2
        branch, rule = grammar.advance(branch, token_id)   # until not branch.in_branch
        state = grammar.after_join(fork)                   # <takeaway> is due
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.start = State(Phase.START)
        self._tags = vocabulary.tags
        special = {*self._tags, vocabulary.eos, vocabulary.newline}
        special.update(token_id for index in vocabulary.index_ids for token_id in index)
        # Ids with a role stand for themselves; all others fall into two classes: a small table.
        self._symbols = dict.fromkeys(vocabulary.blank_ids, _BLANK) | {i: i for i in special}
        self._blank = (vocabulary.blank_ids & special) | {_BLANK, vocabulary.newline}
        self._table: dict[tuple[State, int], _Step] = {}

    def advance(self, state: State, token_id: int) -> tuple[State, Rule | None]:
        """Return the state after ``token_id`` and the rule it breaks, None where it is legal."""
        key = (state, self._symbols.get(token_id, _TEXT))
        step = self._table.get(key)
        if step is None:
            step = self._table[key] = self._step(*key)
        return step

    def branch_start(self, fork: State, branch: int) -> State:
        """Return the state of branch ``branch`` (1-based) right after its forced header.

        Args:
            fork: trunk state with ``at_fork``.
            branch: 1..``fork.num_plans``.
        """
        state = fork._replace(step_index=branch - 1)
        for token_id in self.vocabulary.step_header(branch):
            state, _ = self.advance(state, token_id)
        return state

    def after_join(self, fork: State) -> State:
        """Return the trunk state once every branch opened at ``fork`` is closed."""
        return fork._replace(step_index=fork.num_plans)

    def forced_ids(self, state: State) -> tuple[int, ...]:
        """Return the ids the structure dictates from ``state`` on, empty where the model decides.

        At a fork this is the header of the next step; an engine that forks takes
        ``vocabulary.step_header(j)`` for each branch instead.
        """
        if not state.next_is_forced:
            return ()
        vocabulary = self.vocabulary
        if state.phase in (Phase.FORK_LINE, Phase.STEP_END_LINE, Phase.TAKEAWAY_LINE):
            return (vocabulary.newline,)
        if state.at_join:
            return vocabulary.takeaway_header
        if state.phase is Phase.BRANCHES:
            return vocabulary.step_header(state.step_index + 1)
        index = vocabulary.index_ids[state.step_index - 1]
        newline = (vocabulary.newline,) if state.phase is Phase.STEP_LINE else ()
        return (*newline, *index[state.index_offset :])

    def legal_tags(self, state: State) -> frozenset[Tag]:
        """Return the tags that may come next."""
        return frozenset(
            tag for token_id, tag in self._tags.items() if self.advance(state, token_id)[1] is None
        )

    def end_rule(self, state: State) -> Rule | None:
        """Return the rule broken by a stream that stops at ``state``, None after a proper end."""
        if state.is_terminal:
            return None
        return Rule.EMPTY_RESPONSE if state == self.start else Rule.NO_END

    # One transition, computed once per (state, symbol).

    def _step(self, state: State, symbol: int) -> _Step:
        phase = state.phase
        if phase is Phase.END:
            return state, Rule.AFTER_END
        if symbol == self.vocabulary.eos:
            return State(Phase.END), self._rule_of_eos(state)
        if phase in _AFTER_LINE:
            return self._read_line(state, symbol)
        tag = self._tags.get(symbol)
        if tag is not None:
            return self._read_tag(state, tag)
        if phase in _TEXT_OF_INDEX:
            return self._read_index(state, symbol)
        return self._read_text(state, symbol)

    def _rule_of_eos(self, state: State) -> Rule | None:
        if state == self.start:
            return Rule.EMPTY_RESPONSE
        if state.phase is Phase.CONCLUSION and state.has_text:
            return None
        if state.phase in _OUTSIDE and state.phase is not Phase.START:
            return Rule.EMPTY_CONCLUSION
        return Rule.OPEN_BLOCK

    def _read_line(self, state: State, symbol: int) -> _Step:
        """A newline is due; without it, read the symbol as if the newline stood before it."""
        after = state._replace(phase=_AFTER_LINE[state.phase])
        if symbol == self.vocabulary.newline:
            return after, None
        if symbol == _BLANK:
            return state, Rule.SPACING
        following, rule = self._step(after, symbol)
        return following, rule or Rule.SPACING

    def _read_tag(self, state: State, tag: Tag) -> _Step:
        rule = self._rule_of_tag(state, tag)
        is_skipped = rule is Rule.STRAY_TAG or (
            rule is Rule.TAG_IN_TEXT and tag not in _LATER_PARTS[state.phase]
        )
        if not is_skipped:
            return self._after_tag(state, tag), rule
        if state.phase is Phase.START:
            state = state._replace(has_text=True)
        return state, rule

    def _rule_of_tag(self, state: State, tag: Tag) -> Rule | None:
        phase = state.phase
        if phase in _OUTSIDE:
            if tag is not Tag.GUIDELINE_OPEN:
                return Rule.STRAY_TAG
            if phase is not Phase.CONCLUSION:
                return None
            return Rule.TEXT_OUTSIDE_BLOCK if state.has_text else Rule.SPACING
        if tag is Tag.GUIDELINE_OPEN:
            return Rule.NESTED_GUIDELINE
        if phase in _CLOSER:
            if tag is not _CLOSER[phase]:
                return Rule.TAG_IN_TEXT
            return None if state.has_text else Rule.EMPTY_TEXT
        return self._rule_between_parts(state, tag)

    def _rule_between_parts(self, state: State, tag: Tag) -> Rule | None:
        if state.phase is Phase.GUIDELINE:
            if tag is Tag.PLAN_OPEN:
                is_full = state.num_plans == self.vocabulary.max_plans
                return Rule.TOO_MANY_PLANS if is_full else None
            if tag is Tag.GUIDELINE_CLOSE:
                return None if state.num_plans else Rule.NO_PLANS
        else:
            if tag is Tag.STEP_OPEN:
                return Rule.STEP_COUNT if state.step_index == state.num_plans else None
            if tag is Tag.TAKEAWAY_OPEN:
                return None if state.at_join else Rule.STEP_COUNT
        return Rule.MISPLACED_TAG

    def _after_tag(self, state: State, tag: Tag) -> State:
        """Where a tag leads, legal or not. Counts saturate, so that states stay finitely many."""
        if tag is Tag.GUIDELINE_OPEN or tag is Tag.TAKEAWAY_CLOSE:
            return State(LEADS_TO[tag])
        limit = self.vocabulary.max_plans
        num_plans = min(state.num_plans + (tag is Tag.PLAN_OPEN), limit)
        step_index = min(state.step_index + (tag is Tag.STEP_OPEN), limit)
        return State(LEADS_TO[tag], num_plans, step_index)

    def _read_index(self, state: State, symbol: int) -> _Step:
        is_plan = state.phase is Phase.PLAN_INDEX
        number = state.num_plans if is_plan else state.step_index
        index = self.vocabulary.index_ids[number - 1]
        text = State(_TEXT_OF_INDEX[state.phase], state.num_plans, state.step_index)
        if symbol != index[state.index_offset]:
            return text._replace(has_text=symbol not in self._blank), Rule.WRONG_INDEX
        if state.index_offset + 1 == len(index):
            return text, None
        return state._replace(index_offset=state.index_offset + 1), None

    def _read_text(self, state: State, symbol: int) -> _Step:
        phase, is_blank = state.phase, symbol in self._blank
        if phase in _CLOSER or phase is Phase.CONCLUSION:
            return (state if is_blank else state._replace(has_text=True)), None
        if phase is Phase.BLOCK_END and symbol == self.vocabulary.newline:
            return State(Phase.BLOCK_END_LINE), None
        if phase in (Phase.BLOCK_END, Phase.BLOCK_END_LINE):
            return State(Phase.CONCLUSION, has_text=not is_blank), None
        if is_blank and not state.has_text:
            return state, Rule.SPACING
        return state._replace(has_text=True), _RESIDUE[phase]
