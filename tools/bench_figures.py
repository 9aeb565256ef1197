"""What a benchmark prints and how it takes times: figures with bars, parts timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number and what it must be."""

    name: str
    value: float
    unit: str = ""
    bar: float | None = None
    at_most: bool = False
    detail: str = ""

    @property
    def verdict(self) -> str:
        """PASS, MISS, or nothing where there is no bar."""
        if self.bar is None:
            return ""
        is_reached = self.value <= self.bar if self.at_most else self.value >= self.bar
        return "PASS" if is_reached else "MISS"


def medians(parts: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Return the median CPU seconds of each part."""
    return list(map(statistics.median, _timed(parts, repeats, time.process_time)))


def bests(
    parts: Sequence[Callable[[], object]], repeats: int, clock: Clock = time.perf_counter
) -> list[float]:
    """Return the fewest seconds that each part took."""
    return list(map(min, _timed(parts, repeats, clock)))


def _timed(parts: Sequence[Callable[[], object]], repeats: int, clock: Clock) -> list[list[float]]:
    """Time the parts in turns, after one run of each that touches every page."""
    times: list[list[float]] = [[] for _ in parts]
    for number in range(repeats + 1):
        for part, taken in zip(parts, times, strict=True):
            started = clock()
            part()
            if number:
                taken.append(clock() - started)
    return times


def table_of(title: str, figures: Iterable[Figure]) -> Table:
    """Return one row per figure."""
    table = Table(title=title)
    for column in ("figure", "value", "bar", "", "detail"):
        table.add_column(column, justify="right" if column in ("value", "bar") else "left")
    colours = {"PASS": "green", "MISS": "red", "": "default"}
    for figure in figures:
        sign = "<=" if figure.at_most else ">="
        bar = "" if figure.bar is None else f"{sign} {figure.bar:g} {figure.unit}"
        verdict = f"[{colours[figure.verdict]}]{figure.verdict}"
        value = f"{figure.value:.2f} {figure.unit}"
        table.add_row(figure.name, value, bar, verdict, figure.detail)
    return table
