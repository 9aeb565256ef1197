"""Push time over fleet size as a picture: direct, relayed and the floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from npr_megatron.cli.weights.plan_tables import in_time
from npr_megatron.errors import InputError
from npr_megatron.planning.fleet_sweep import SweepPoint

_INK, _GRID = "#4a5568", "#e2e8f0"
_WAYS = {
    "direct": ("#c05621", "-", "center"),
    "relayed": ("#2b6cb0", "-", "bottom"),
    "floor": (_INK, ":", "top"),
}
"""Colour and line of each way, and where its name stands beside the end of its line."""


def draw_sweep(path: Path, title: str, points: Sequence[SweepPoint], num_gpus: int) -> None:
    """Write a chart of ``points`` to ``path``; a thin line marks the fleet of ``num_gpus``.

    Raises:
        InputError: the file cannot be written, or its suffix is no image format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    sizes = [point.num_gpus for point in points]
    curves = {
        "direct": [point.direct_s for point in points],
        "relayed": [point.relay_s for point in points],
        "floor": [point.floor_s for point in points],
    }
    for name, seconds in curves.items():
        color, line, place = _WAYS[name]
        axes.plot(sizes, seconds, color=color, linestyle=line, linewidth=1.8)
        end, text = (sizes[-1], seconds[-1]), f" {name}, {in_time(seconds[-1])}"
        axes.annotate(text, end, color=color, fontsize=9, va=place)
    axes.axvline(num_gpus, color=_GRID, linewidth=1.2, zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(sizes[0], sizes[-1] * 6)  # room for the names at the ends of the lines
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: in_time(seconds)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("GPUs of the fleet")
    axes.set_title(f"Time of a push: {title}", loc="left", fontsize=10)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    try:
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:
        raise InputError(
            f"chart {path} cannot be written: {error}; give a path such as push.png"
        ) from error
