"""Draw a trajectory in the terminal: prompt, guideline, branches side by side, takeaway, answer."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box as borders
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from npr_megatron.records.trajectory import FinishReason, Trajectory
from npr_megatron.report.outline import Box, BoxKind, outline

MAX_CHARACTERS = 600
"""Longer texts are cut in the terminal; the page shows them whole."""
_STYLES = {
    BoxKind.PROMPT: "bold",
    BoxKind.GUIDELINE: "magenta",
    BoxKind.PLAN: "magenta",
    BoxKind.FORK: "cyan",
    BoxKind.BRANCH: "cyan",
    BoxKind.TAKEAWAY: "yellow",
    BoxKind.TEXT: "green",
}


def trajectory_tree(trajectory: Trajectory, pieces: Sequence[str]) -> Tree:
    """Return a tree of ``trajectory``; works for malformed and sequential ones too.

    Args:
        trajectory: [T] tokens.
        pieces: [T] decoded string of each token.
    """
    tree = Tree(_headline(trajectory), guide_style="dim")
    for box in outline(trajectory, pieces):
        _add(tree, box)
    if trajectory.finish is not FinishReason.STOP:
        detail = f": {trajectory.finish_detail}" if trajectory.finish_detail else ""
        tree.add(Text(f"ended by {trajectory.finish}{detail}", "bold red"))
    return tree


def headline(trajectory: Trajectory) -> str:
    """Return name, mode and lengths of ``trajectory`` in one line."""
    num_tokens, path = trajectory.num_tokens, trajectory.critical_path_tokens
    lengths = f"{num_tokens} tokens"
    if path < num_tokens:
        lengths += f", longest path {path} ({num_tokens / path:.1f}x shorter)"
    return f"{trajectory.prompt_id} #{trajectory.rollout} | {trajectory.mode} | {lengths}"


def _headline(trajectory: Trajectory) -> Text:
    name, rest = headline(trajectory).split(" | ", 1)
    return Text.assemble((name, "bold"), (f"  {rest}", "dim"))


def _add(tree: Tree, box: Box) -> None:
    if box.kind is BoxKind.FORK:
        tree.add(_branches(box))
    elif box.kind is BoxKind.GUIDELINE:
        node = tree.add(_line(box, f"guideline, {len(box.children)} plans"))
        for plan in box.children:
            node.add(_body(plan))
        if box.text:  # stray text between plans
            node.add(_body(box))
    else:
        name = "answer" if box.kind is BoxKind.TEXT else str(box.kind)
        tree.add(Text.assemble(_line(box, name), "  ", _body(box)))


def _branches(fork: Box) -> RenderableType:
    """One column per branch, so that what ran side by side stands side by side."""
    table = Table(box=borders.ROUNDED, border_style=_STYLES[BoxKind.FORK], show_header=True)
    for index, branch in enumerate(fork.children, start=1):
        table.add_column(_line(branch, f"branch {index}"), overflow="fold")
    table.add_row(*(_body(branch) for branch in fork.children))
    return table


def _line(box: Box, name: str) -> Text:
    line = Text.assemble((name, _STYLES[box.kind]), (f" {box.num_tokens}t", "dim"))
    if not box.is_closed:
        line.append(" not closed", "red")
    return line


def _body(box: Box) -> Text:
    text = box.text
    if len(text) > MAX_CHARACTERS:
        text = f"{text[:MAX_CHARACTERS]}... ({len(box.text) - MAX_CHARACTERS} more characters)"
    return Text(text)
