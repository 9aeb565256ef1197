"""The stage table: how valid, right and parallel the model was after each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box as borders
from rich.table import Table

from npr_megatron.config.stages import STAGES

Evaluation = Mapping[str, Any]
"""One line of ``evaluations.jsonl``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of the stage table."""

    title: str
    meaning: str
    cell: Callable[[Evaluation], str]


def stage_rows(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Return the last measurement of each stage and mode, in the order of the stages."""
    last: dict[tuple[str, str], Evaluation] = {}
    for evaluation in evaluations:
        key = (str(evaluation["stage"]), str(evaluation["mode"]))
        last.pop(key, None)
        last[key] = evaluation
    order = {name: index for index, name in enumerate(STAGES)}
    modes = {"sequential": 0, "parallel": 1}
    return sorted(
        last.values(),
        key=lambda row: (order.get(row["stage"], len(order)), modes.get(row["mode"], len(modes))),
    )


def stage_table(evaluations: Sequence[Evaluation], *, title: str | None = None) -> Table:
    """Return the table printed at the end of a run; measurements that were not taken are ``-``."""
    table = Table(
        title=title,
        title_justify="left",
        box=borders.SIMPLE_HEAD,
        show_edge=False,
        padding=0,  # so that ten columns fit a terminal of 80
    )
    for column in COLUMNS:
        is_word = column.title in ("stage", "decoding")
        table.add_column(column.title, justify="left" if is_word else "right", no_wrap=True)
    rows = stage_rows(evaluations)
    for row in rows:
        style = "bold" if row["mode"] == "parallel" else None
        table.add_row(*(column.cell(row) for column in COLUMNS), style=style)
    if not rows:
        table.caption = "nothing was measured yet"
    return table


def _percent(name: str) -> Callable[[Evaluation], str]:
    def cell(row: Evaluation) -> str:
        value = row.get(name)
        return "-" if value is None else f"{100 * value:.1f}%"

    return cell


def _number(name: str, form: str) -> Callable[[Evaluation], str]:
    def cell(row: Evaluation) -> str:
        value = row.get(name)
        return "-" if value is None else format(value, form)

    return cell


def _shorter(row: Evaluation) -> str:
    total, path = row.get("total_tokens"), row.get("critical_path_tokens")
    return f"{total / path:.2f}x" if total and path else "-"


def _speedup(row: Evaluation) -> str:
    value = row.get("speedup")
    return "-" if value is None else f"{value:.2f}x"


COLUMNS: tuple[Column, ...] = (
    Column(title="stage", meaning="after which stage", cell=lambda row: str(row["stage"])),
    Column(title="decoding", meaning="how answers were decoded", cell=lambda row: str(row["mode"])),
    Column(title="valid", meaning="answers that keep the schema", cell=_percent("validity")),
    Column(title="right", meaning="answers that are valid and correct", cell=_percent("accuracy")),
    Column(
        title="parallel", meaning="answers that fork at least once", cell=_percent("trigger_rate")
    ),
    Column(
        title="faithful", meaning="answers whose every step is right", cell=_percent("faithfulness")
    ),
    Column(title="tokens", meaning="mean generated tokens", cell=_number("total_tokens", ".1f")),
    Column(title="path", meaning="mean longest path", cell=_number("critical_path_tokens", ".1f")),
    Column(title="shorter", meaning="tokens / path", cell=_shorter),
    Column(
        title="speed-up",
        meaning="tokens/s of parallel over sequential decoding at batch 1",
        cell=_speedup,
    ),
)
