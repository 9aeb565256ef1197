"""Draw packed rows as the trainer gets them, so that people see what is learnt before it is.

What counts as learnt is read from the labels of the packed batch itself, not from the sample it was
made from: what these views show is what the loss sees.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from npr_megatron.records.sample import PackedBatch
from npr_megatron.topology.layout import predecessors

MAX_CHARACTERS = 1200
"""Longer samples are cut in the terminal; the page shows them whole."""
_BRANCH_STYLES = ("cyan", "yellow", "magenta", "blue", "red")
_BRANCH_COLOURS = ("#cdeef5", "#fdf0c4", "#f3d9f2", "#d8e2fb", "#fbdcd6")
LEGEND = (
    "dim: read, not learnt; bold: learnt; colours: branches, which do not see one another; "
    "reversed or framed: in the response, but nothing predicts it"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownToken:
    """One token of a packed row."""

    text: str
    token_id: int
    position: int
    block: int
    branch: int
    is_learnt: bool
    is_unpredicted: bool
    """Stands behind learnt tokens, but no logit is trained to give it: the opening of a later
    branch, or what follows a join."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownSample:
    """One sample of a packed row."""

    place: str
    tokens: tuple[ShownToken, ...]

    @property
    def headline(self) -> str:
        """Where it comes from, how long it is and how much of it is learnt."""
        num_learnt = sum(token.is_learnt for token in self.tokens)
        return f"{self.place}: {len(self.tokens)} tokens, {num_learnt} learnt"


def shown_row(
    batch: PackedBatch, row: int, places: Sequence[str], pieces: Sequence[str]
) -> list[ShownSample]:
    """Return the samples of one row of ``batch``.

    Args:
        places: name of each sample of the row, left to right.
        pieces: [S] text of each token of the row.

    Raises:
        AssertionError: a label of the batch is not the token it stands for.
    """
    samples = []
    for number, place in enumerate(places):
        cells = np.flatnonzero(batch.segment[row] == number).tolist()
        block, branch = batch.block[row, cells], batch.branch[row, cells]
        predecessor = predecessors(block, branch)
        ids, labels = batch.token_ids[row, cells], batch.labels[row, cells]
        is_learnt = (predecessor >= 0) & (labels[predecessor] >= 0)
        told = labels[predecessor[is_learnt]]
        assert (told == ids[is_learnt]).all(), f"{place}: labels differ from what follows"
        is_response = np.maximum.accumulate(is_learnt)
        samples.append(
            ShownSample(
                place=place,
                tokens=tuple(
                    ShownToken(
                        text=pieces[cell],
                        token_id=int(ids[i]),
                        position=int(batch.position_ids[row, cell]),
                        block=int(block[i]),
                        branch=int(branch[i]),
                        is_learnt=bool(is_learnt[i]),
                        is_unpredicted=bool(is_response[i] and not is_learnt[i]),
                    )
                    for i, cell in enumerate(cells)
                ),
            )
        )
    return samples


def draw_row(samples: Sequence[ShownSample]) -> RenderableType:
    """Return a row for the terminal."""
    parts: list[RenderableType] = []
    for sample in samples:
        text, shown = Text(), 0
        for token in sample.tokens:
            text.append(token.text, _style(token))
            shown += len(token.text)
            if shown > MAX_CHARACTERS:
                text.append(" ...", "dim")
                break
        parts += [Text(sample.headline, "underline"), text, Text()]
    return Group(*parts)


def _style(token: ShownToken) -> str:
    colour = f" {_BRANCH_STYLES[(token.branch - 1) % len(_BRANCH_STYLES)]}" if token.branch else ""
    if token.is_unpredicted:
        return f"reverse{colour}"
    return f"bold{colour or ' green'}" if token.is_learnt else f"dim{colour}"


def write_rows_page(path: Path, rows: Sequence[Sequence[ShownSample]], title: str) -> None:
    """Write the same as one HTML file; every token tells its id, position and branch."""
    body = "\n".join(
        f"<h2>row {number}</h2>\n" + "\n".join(map(_sample_html, samples))
        for number, samples in enumerate(rows, start=1)
    )
    path.write_text(
        f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_CSS}</style><h1>{html.escape(title)}</h1><p>{html.escape(LEGEND)}; point at a "
        f"token for its id, position and branch</p>\n{body}\n",
        encoding="utf-8",
    )


def _sample_html(sample: ShownSample) -> str:
    tokens = "".join(map(_token_html, sample.tokens))
    return f"<h3>{html.escape(sample.headline)}</h3><pre>{tokens}</pre>"


def _token_html(token: ShownToken) -> str:
    kind = "u" if token.is_unpredicted else "l" if token.is_learnt else "c"
    where = f"block {token.block}, branch {token.branch}" if token.branch else "trunk"
    told = {"l": "learnt", "u": "nothing predicts it", "c": "read only"}[kind]
    colour = _BRANCH_COLOURS[(token.branch - 1) % len(_BRANCH_COLOURS)] if token.branch else ""
    style = f' style="background:{colour}"' if colour else ""
    hint = f"id {token.token_id}, position {token.position}, {where}: {told}"
    return f'<span class="{kind}"{style} title="{hint}">{html.escape(token.text)}</span>'


_CSS = (
    "body{font:15px system-ui;max-width:70em;margin:2em auto;padding:0 1em}"
    "pre{white-space:pre-wrap;line-height:1.6;border-left:3px solid #ddd;padding-left:1em}"
    ".c{color:#999}.l{font-weight:600}.u{outline:1px solid #b00}"
)
