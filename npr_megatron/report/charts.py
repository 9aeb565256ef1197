"""Curves as SVG text for the page: one small chart per metric, one colour per stage, readable
axes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

STAGE_COLORS = {
    "seed": "#7a7f87",
    "zero": "#2b6cb0",
    "sample": "#b7791f",
    "beta": "#c05621",
    "npr": "#2f855a",
}
"""Distinguishable without colour vision by lightness; used by every chart and the page."""
OTHER_COLOR = "#553c9a"
MAX_POINTS = 400
"""Longer curves are thinned: no screen shows more, and the page stays small."""
_INK, _GRID = "#4a5568", "#e2e8f0"
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's own font
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One metric over the steps of one stage."""

    title: str
    steps: Sequence[int]
    values: Sequence[float]
    color: str


def draw_curve(curve: Curve) -> str:
    """Return an SVG of ``curve``: the values, and their running mean where they are many."""
    steps, values = _thin(curve.steps, curve.values)
    figure, axes = _new_chart(curve.title, (3.0, 1.75))
    is_noisy = len(values) >= 20
    axes.plot(steps, values, color=curve.color, alpha=0.3 if is_noisy else 1.0, linewidth=1.2)
    if is_noisy:
        axes.plot(steps, _running_mean(values), color=curve.color, linewidth=1.6)
    if _spans_decades(values):
        axes.set_yscale("log")
    elif curve.title.endswith(("validity", "accuracy", "_frac", "faithfulness")):
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.set_xlabel("step", labelpad=1)
    return _svg(figure, curve.title + curve.color)


def draw_progress(rows: Sequence[tuple[str, str, Mapping[str, float]]]) -> str:
    """Return an SVG of bars: how far validity and accuracy got after each stage.

    Args:
        rows: (label, stage, {"validity": share, "accuracy": share}) in the order of the stages.
    """
    figure, axes = _new_chart("", (max(3.2, 1.25 * len(rows) + 0.6), 2.3))
    for index, (_, stage, values) in enumerate(rows):
        color = STAGE_COLORS.get(stage, OTHER_COLOR)
        for measure, shift, strength in (("validity", -0.2, 0.4), ("accuracy", 0.2, 1.0)):
            if measure in values:
                x, value = index + shift, values[measure]
                axes.bar(x, value, width=0.37, color=color, alpha=strength)
                axes.text(x, value + 0.02, f"{100 * value:.0f}", ha="center", color=_INK, size=8)
    axes.set_xticks(range(len(rows)), [label for label, _, _ in rows])
    axes.set_ylim(0, 1.12)
    axes.set_yticks([0, 0.5, 1.0])
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0, decimals=0))
    legend = "validity (pale) and accuracy (full), % of answers"
    axes.set_title(legend, loc="left", size=8.5, color=_INK)
    return _svg(figure, "progress")


def _new_chart(title: str, size_inches: tuple[float, float]) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=size_inches)
        width, height = size_inches  # fixed margins: a layout solver takes most of the page's time
        axes = figure.add_axes((0.5 / width, 0.4 / height, 1 - 0.6 / width, 1 - 0.68 / height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.set_title(title, loc="left", size=9, color="#1a202c")
    return figure, axes


def _svg(figure: Figure, salt: str) -> str:
    """Return the <svg> element; ids are made from ``salt``, so charts on one page do not clash."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**_RC, "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    # group names ("axes_1") recur in every chart and nothing refers to them
    return re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])


def _thin(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    stride = math.ceil(len(steps) / MAX_POINTS)
    return list(steps[::stride]), list(values[::stride])


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over a tenth of the curve; NaN counts as absent."""
    half = max(len(values) // 20, 1)
    means: list[float] = []
    for index in range(len(values)):
        window = [v for v in values[max(index - half, 0) : index + half + 1] if v == v]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def _spans_decades(values: Sequence[float]) -> bool:
    finite = [value for value in values if value == value]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) > 50
