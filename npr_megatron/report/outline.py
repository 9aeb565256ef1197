"""Cut a trajectory into the boxes a viewer draws. Lenient on purpose: a broken answer has an
outline too.

Works on the decoded piece of every token, so it needs no tokenizer. It is no parser: nothing is
accepted or refused here, and every response token lies in exactly one top-level box or in white
space between boxes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from npr_megatron.errors import InputError
from npr_megatron.records.trajectory import FinishReason, Trajectory
from npr_megatron.schema.tags import Tag


class BoxKind(StrEnum):
    """What a box shows."""

    PROMPT = "prompt"
    GUIDELINE = "guideline"
    PLAN = "plan"
    FORK = "fork"  # the branches of one block
    BRANCH = "branch"
    TAKEAWAY = "takeaway"
    TEXT = "text"  # trunk text outside all tags: the answer, if the schema was kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A run of tokens with its text and inner boxes.

    Example: a step ``<step> NL 1: a </step>`` is
    ``Box(kind=BRANCH, text="1: a", num_tokens=6, first_position=20, last_position=25)``.
    """

    kind: BoxKind
    text: str
    """Decoded text without tags and end token, stripped."""
    num_tokens: int
    """Tokens in the box, tags and inner boxes included."""
    first_position: int
    """Logical position of the first token."""
    last_position: int
    children: tuple[Box, ...] = ()
    is_closed: bool = True
    """False where the closing tag is missing."""


_OPENS: dict[str, BoxKind] = {
    Tag.GUIDELINE_OPEN: BoxKind.GUIDELINE,
    Tag.PLAN_OPEN: BoxKind.PLAN,
    Tag.STEP_OPEN: BoxKind.BRANCH,
    Tag.TAKEAWAY_OPEN: BoxKind.TAKEAWAY,
}
_CLOSES: dict[str, BoxKind] = {
    Tag.GUIDELINE_CLOSE: BoxKind.GUIDELINE,
    Tag.PLAN_CLOSE: BoxKind.PLAN,
    Tag.STEP_CLOSE: BoxKind.BRANCH,
    Tag.TAKEAWAY_CLOSE: BoxKind.TAKEAWAY,
}


def outline(trajectory: Trajectory, pieces: Sequence[str]) -> tuple[Box, ...]:
    """Return the top-level boxes of ``trajectory``: the prompt, then the response in order.

    Args:
        trajectory: [T] tokens.
        pieces: [T] decoded string of each token.

    Raises:
        InputError: there is not one piece per token.
    """
    if len(pieces) != len(trajectory.token_ids):
        raise InputError(
            f"trajectory {trajectory.prompt_id} has {len(trajectory.token_ids)} tokens and "
            f"{len(pieces)} decoded pieces; decode every token once"
        )
    start = trajectory.prompt_length
    texts = list(pieces)
    if trajectory.finish is FinishReason.STOP and len(texts) > start:
        texts[-1] = ""  # the end token
    places = zip(trajectory.block.tolist(), trajectory.branch.tolist(), strict=True)
    tokens = zip(texts, trajectory.position_ids.tolist(), places, strict=True)
    prompt = Box(
        kind=BoxKind.PROMPT,
        text="".join(pieces[:start]).strip(),
        num_tokens=start,
        first_position=0,
        last_position=max(start - 1, 0),
    )
    return (prompt, *boxes_of(itertools.islice(tokens, start, None)))


def boxes_of(tokens: Iterable[tuple[str, int, tuple[int, int]]]) -> tuple[Box, ...]:
    """Return the top-level boxes of a response, which may still be growing.

    Args:
        tokens: (text, position, (block, branch)) in linear order: trunk, branch 1, ..., trunk.
    """
    scan = _Scan()
    previous = (0, 0)
    for text, position, place in tokens:
        if place != previous:
            scan.leave_branch()
        previous = place
        scan.take(text, position)
    return scan.finish()


@dataclass(slots=True)
class _Draft:
    """A box being filled."""

    kind: BoxKind
    pieces: list[str] = field(default_factory=list[str])
    positions: list[int] = field(default_factory=list[int])
    children: list[_Draft] = field(default_factory=list["_Draft"])
    is_closed: bool = False

    @property
    def is_blank(self) -> bool:
        return not self.children and not "".join(self.pieces).strip()

    def freeze(self) -> Box:
        children = tuple(child.freeze() for child in self.children)
        needs_tag = self.kind not in (BoxKind.TEXT, BoxKind.FORK)
        spans = [(p, p) for p in self.positions]
        spans += [(c.first_position, c.last_position) for c in children]
        return Box(
            kind=self.kind,
            text="".join(self.pieces).strip(),
            num_tokens=len(self.positions) + sum(child.num_tokens for child in children),
            first_position=min(first for first, _ in spans),
            last_position=max(last for _, last in spans),
            children=children,
            is_closed=self.is_closed or not needs_tag,
        )


class _Scan:
    """Walks the response once; at most a guideline and a plan, or a fork and a branch, are open."""

    def __init__(self) -> None:
        self._top: list[_Draft] = []
        self._open: list[_Draft] = []

    def take(self, piece: str, position: int) -> None:
        opened, closed = _OPENS.get(piece), _CLOSES.get(piece)
        if opened is not None:
            self._begin(opened)
            self._open[-1].positions.append(position)
        elif closed is not None and any(draft.kind is closed for draft in self._open):
            while self._open[-1].kind is not closed:
                self._open.pop()
            draft = self._open.pop()
            draft.positions.append(position)
            draft.is_closed = True
        else:  # text, and closers of nothing
            draft = self._open[-1] if self._open else self._trunk_text()
            draft.pieces.append(piece)
            draft.positions.append(position)

    def leave_branch(self) -> None:
        """The next token belongs to another branch or to the trunk: nothing stays open across."""
        self._open.clear()

    def finish(self) -> tuple[Box, ...]:
        return tuple(draft.freeze() for draft in self._top if not draft.is_blank)

    def _begin(self, kind: BoxKind) -> None:
        draft = _Draft(kind)
        if kind is BoxKind.PLAN and self._open and self._open[0].kind is BoxKind.GUIDELINE:
            del self._open[1:]
            self._open[0].children.append(draft)
            self._open.append(draft)
            return
        self._open[:] = [draft]
        if kind is BoxKind.BRANCH:
            self._fork().children.append(draft)
        else:
            self._top.append(draft)

    def _fork(self) -> _Draft:
        """Return the fork a new branch joins: the last one, if only white space follows it."""
        drafts = [draft for draft in self._top if not draft.is_blank]
        if drafts and drafts[-1].kind is BoxKind.FORK:
            return drafts[-1]
        fork = _Draft(BoxKind.FORK)
        self._top.append(fork)
        return fork

    def _trunk_text(self) -> _Draft:
        if not self._top or self._top[-1].kind is not BoxKind.TEXT:
            self._top.append(_Draft(BoxKind.TEXT))
        return self._top[-1]
