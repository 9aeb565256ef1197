"""Answers while they grow: what was told of each, and one picture of all of them.

Pure: events in, a rich renderable out. Who redraws it when is ``report.answer_view``'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from npr_megatron.engine.events import (
    Event,
    FinishEvent,
    ForkEvent,
    JoinEvent,
    RestartEvent,
    TokenEvent,
)
from npr_megatron.report.outline import Box, boxes_of
from npr_megatron.report.tree import add_boxes, show_lengths

NUM_BOXES = 3
"""Parts of a growing answer that are shown: a guideline, its branches, a takeaway."""
_Token = tuple[str, int, tuple[int, int]]


class GrowingAnswer:
    """What was told of one answer so far.

    Args:
        name: stands above it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.num_tokens = 0
        self.note = ""
        """What befell it."""
        self.is_finished = False
        self._stages: list[list[list[_Token]]] = [[[]]]
        """Streams of the trunk and of blocks in turn."""

    def take(self, event: Event, text: str = "") -> None:
        """Go on by ``event``; ``text`` is what a token adds to its stream."""
        match event:
            case TokenEvent():
                place = (event.block, event.branch)
                stream = self._stages[-1][max(event.branch - 1, 0)]
                stream.append((text, event.position, place))
                self.num_tokens += 1
            case ForkEvent():
                self._stages.append([[] for _ in range(event.num_branches)])
            case JoinEvent():
                self._stages.append([[]])
            case RestartEvent():
                self._stages, self.num_tokens = [[[]]], 0
                self.note = f"started again under weight version {event.weight_version}"
            case FinishEvent():
                self.is_finished = True

    @property
    def num_branches(self) -> int:
        """Branches between fork and join; 0 on the trunk."""
        tokens = self._stages[-1]
        return len(tokens) if len(self._stages) % 2 == 0 else 0

    def boxes(self) -> tuple[Box, ...]:
        """Return the parts of the answer so far."""
        return boxes_of(self._linear())

    def lengths(self) -> str:
        """Return how long it is by now."""
        positions = [position for _, position, _ in self._linear()]
        path = max(positions) - min(positions) + 1 if positions else 0
        return show_lengths(self.num_tokens, path)

    def _linear(self) -> Iterator[_Token]:
        for streams in self._stages:
            for stream in streams:
                yield from stream


def live_tree(answers: Sequence[GrowingAnswer], summary: str, max_answers: int) -> RenderableType:
    """Return the last parts of the first ``max_answers`` growing answers above ``summary``."""
    growing = [answer for answer in answers if not answer.is_finished]
    parts: list[RenderableType] = [_tree(answer) for answer in growing[:max_answers]]
    if len(growing) > max_answers:
        parts.append(Text(f"and {len(growing) - max_answers} more at the same time", "dim"))
    return Group(*parts, Text(summary, "bold"))


def _tree(answer: GrowingAnswer) -> Tree:
    lengths = answer.lengths()
    if answer.num_branches:
        lengths += f", {answer.num_branches} branches at once"
    title = Text.assemble((answer.name, "bold"), (f"  {lengths}", "dim"))
    if answer.note:
        title.append(f"  {answer.note}", "yellow")
    tree = Tree(title, guide_style="dim")
    boxes = answer.boxes()
    num_hidden = max(len(boxes) - NUM_BOXES, 0)
    if num_hidden:
        tree.add(Text(f"... earlier parts: {num_hidden}", "dim"))
    add_boxes(tree, boxes[num_hidden:], is_growing=True)
    return tree
