"""Draw a trajectory in the terminal: prompt, guideline, branches side by side, takeaway, answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box as borders
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from npr_megatron.records.trajectory import FinishReason, Trajectory
from npr_megatron.report.outline import Box, BoxKind, outline

MAX_CHARACTERS = 600
"""Longer texts are cut in the terminal; the page shows them whole."""
GROWING_CHARACTERS = 240
"""So much of the end of a text is shown while it grows."""
_STYLES = {
    BoxKind.PROMPT: "bold",
    BoxKind.GUIDELINE: "magenta",
    BoxKind.PLAN: "magenta",
    BoxKind.FORK: "cyan",
    BoxKind.BRANCH: "cyan",
    BoxKind.TAKEAWAY: "yellow",
    BoxKind.TEXT: "green",
}
_BRANCH_STYLES = ("cyan", "green", "yellow", "magenta", "blue")


def trajectory_tree(trajectory: Trajectory, pieces: Sequence[str]) -> Tree:
    """Return a tree of ``trajectory``; works for malformed and sequential ones too.

    Args:
        trajectory: [T] tokens.
        pieces: [T] decoded string of each token.
    """
    name, rest = headline(trajectory).split(" | ", 1)
    tree = Tree(Text.assemble((name, "bold"), (f"  {rest}", "dim")), guide_style="dim")
    add_boxes(tree, outline(trajectory, pieces))
    if trajectory.finish is not FinishReason.STOP:
        detail = f": {trajectory.finish_detail}" if trajectory.finish_detail else ""
        tree.add(Text(f"ended by {trajectory.finish}{detail}", "bold red"))
    elif trajectory.finish_detail:
        tree.add(Text(trajectory.finish_detail, "yellow"))
    return tree


def headline(trajectory: Trajectory) -> str:
    """Return name, mode and lengths of ``trajectory`` in one line."""
    lengths = show_lengths(trajectory.num_tokens, trajectory.critical_path_tokens)
    return f"{trajectory.prompt_id} #{trajectory.rollout} | {trajectory.mode} | {lengths}"


def show_lengths(num_tokens: int, path: int) -> str:
    """Return how many tokens there are, and how many on the longest path if that is less."""
    lengths = f"{num_tokens} tokens"
    if path < num_tokens:
        lengths += f", longest path {path} ({num_tokens / path:.1f}x shorter)"
    return lengths


def add_boxes(tree: Tree, boxes: Iterable[Box], *, is_growing: bool = False) -> None:
    """Draw ``boxes`` below ``tree``.

    Args:
        is_growing: show the end of long texts, in columns that keep their width, and take a missing
            closing tag for one that is still to come.
    """
    for box in boxes:
        if box.kind is BoxKind.FORK:
            tree.add(_branches(box, is_growing))
        elif box.kind is BoxKind.GUIDELINE:
            node = tree.add(_line(box, f"guideline, {len(box.children)} plans", is_growing))
            for plan in box.children:
                node.add(_body(plan, is_growing))
            if box.text:  # stray text between plans
                node.add(_body(box, is_growing))
        else:
            name = "answer" if box.kind is BoxKind.TEXT else str(box.kind)
            line = _line(box, name, is_growing)
            tree.add(Text.assemble(line, "  ", _body(box, is_growing)))


def _branches(fork: Box, is_growing: bool) -> RenderableType:
    """One column per branch, so that what ran side by side stands side by side."""
    table = Table(box=borders.ROUNDED, border_style=_STYLES[BoxKind.FORK], expand=is_growing)
    for index, branch in enumerate(fork.children, start=1):
        style = _BRANCH_STYLES[(index - 1) % len(_BRANCH_STYLES)]
        line = _line(branch, f"branch {index}", is_growing, style)
        table.add_column(line, overflow="fold", ratio=1 if is_growing else None)
    table.add_row(*(_body(branch, is_growing) for branch in fork.children))
    return table


def _line(box: Box, name: str, is_growing: bool, style: str | None = None) -> Text:
    line = Text.assemble((name, style or _STYLES[box.kind]), (f" {box.num_tokens}t", "dim"))
    if not box.is_closed:
        line.append(*((" ...", "dim") if is_growing else (" not closed", "red")))
    return line


def _body(box: Box, is_growing: bool) -> Text:
    text = box.text
    if is_growing and len(text) > GROWING_CHARACTERS:
        text = f"... {text[-GROWING_CHARACTERS:]}"
    elif len(text) > MAX_CHARACTERS:
        text = f"{text[:MAX_CHARACTERS]}... ({len(text) - MAX_CHARACTERS} more characters)"
    return Text(text)
