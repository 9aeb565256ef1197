"""The view of a running pipeline: progress with rate and remaining time, a live table, notes,
samples.

In a terminal the view is redrawn in place; elsewhere (CI, nohup, a batch job) it prints lines, at
most one every few seconds. It only shows what it is given and never fails a run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Self

from rich import box as borders
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

_BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_NUM_REMEMBERED = 40


class LiveView:
    """Shows one stage at a time.

    Example::

        with LiveView() as view:
            view.begin_stage("zero", num_steps=40, unit="step")
            for step in range(1, 41):
                view.advance(step, {"train/loss": 0.3})
            view.end_stage()
    """

    def __init__(self, console: Console | None = None, *, plain_interval_s: float = 5.0) -> None:
        self._console = console or Console()
        self._plain_interval_s = plain_interval_s
        self._live: Live | None = None
        self._stage: _StageProgress | None = None
        self._activity = ""
        self._last_line_s = float("-inf")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                transient=True,
                refresh_per_second=4,
            )
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def begin_stage(self, name: str, num_steps: int, unit: str = "step") -> None:
        """Start showing ``name``; ``done`` steps were finished before, by a run that was
        resumed."""
        self._stage = _StageProgress(name, num_steps, unit)
        self._activity = ""
        self._last_line_s = float("-inf")
        self._console.print(Rule(Text(f"{name}  {_count(num_steps, unit)}", "bold"), align="left"))

    def resume(self, done: int) -> None:
        """Say that ``done`` steps of the stage were finished before; rates leave them out."""
        stage = self._current()
        stage.skip(done)
        self.note(f"{stage.name}: resumed after {_count(done, stage.unit)}")

    def activity(self, text: str) -> None:
        """Say what is happening inside the current step; shown in a terminal only."""
        self._activity = text

    def advance(self, step: int, values: Mapping[str, float]) -> None:
        """Show that ``step`` steps are done, and what the last one measured."""
        stage = self._current()
        stage.advance(step, values)
        now = time.monotonic()
        is_due = now - self._last_line_s >= self._plain_interval_s or step >= stage.num_steps
        if self._live is None and is_due:
            self._last_line_s = now
            self._print_plain(stage.line())

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(Text(text), soft_wrap=True)

    def show_sample(self, tree: Tree) -> None:
        """Print a trajectory that stays."""
        self._console.print(tree)

    def show(self, renderable: RenderableType) -> None:
        """Print anything else that stays, such as the stage table."""
        self._console.print(renderable)

    def end_stage(self) -> None:
        """Print the last state of the stage and stop showing it."""
        stage = self._current()
        self._stage, self._activity = None, ""
        if self._live is not None:
            self._console.print(stage.table())
        self._print_plain(stage.closing_line())

    def _current(self) -> _StageProgress:
        if self._stage is None:
            raise ValueError("no stage is shown; call begin_stage first")
        return self._stage

    def _print_plain(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def _render(self) -> RenderableType:
        if self._stage is None:
            return Text(self._activity, "dim")
        return Group(self._stage.table(), self._stage.bar(self._activity))


class _StageProgress:
    """Counts, times and remembers one stage."""

    def __init__(self, name: str, num_steps: int, unit: str) -> None:
        self.name, self.num_steps, self.unit = name, num_steps, unit
        self._first, self._step = 0, 0
        self._started_s = time.monotonic()
        self._history: dict[str, deque[float]] = {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TextColumn("[dim]{task.fields[activity]}"),
        )
        self._task = self._progress.add_task(name, total=num_steps, rate="", activity="")

    def skip(self, done: int) -> None:
        self._first = self._step = done
        self._started_s = time.monotonic()

    def advance(self, step: int, values: Mapping[str, float]) -> None:
        self._step = step
        for name, value in values.items():
            self._history.setdefault(name, deque(maxlen=_NUM_REMEMBERED)).append(value)

    def bar(self, activity: str) -> RenderableType:
        self._progress.update(
            self._task, completed=self._step, rate=self._rate_and_rest(), activity=activity
        )
        return self._progress

    def table(self) -> Table:
        table = Table(box=borders.SIMPLE, pad_edge=False, show_edge=False)
        table.add_column("metric", style="cyan", no_wrap=True)
        table.add_column("now", justify="right", no_wrap=True)
        table.add_column("mean of 10", justify="right", no_wrap=True)
        table.add_column(f"last {_NUM_REMEMBERED}", style="green", no_wrap=True)
        for name, history in self._history.items():
            recent = list(history)[-10:]
            mean = sum(recent) / len(recent)
            table.add_row(name, show_value(history[-1]), show_value(mean), spark_line(history))
        return table

    def line(self) -> str:
        values = "  ".join(f"{n} {show_value(h[-1])}" for n, h in self._history.items())
        return f"{self.name} {self._step}/{self.num_steps}  {self._rate_and_rest()}  {values}"

    def closing_line(self) -> str:
        took = show_duration(time.monotonic() - self._started_s)
        return f"{self.name}: {_count(self._step - self._first, self.unit)} in {took}"

    def _rate_and_rest(self) -> str:
        elapsed, num_done = time.monotonic() - self._started_s, self._step - self._first
        if num_done == 0:
            return f"{show_duration(elapsed)} so far"
        per_step = elapsed / num_done
        rest = show_duration(per_step * (self.num_steps - self._step))
        if per_step >= 1:
            return f"{per_step:.1f} s/{self.unit}, {rest} left"
        return f"{_count(f'{1 / per_step:.1f}', self.unit)}/s, {rest} left"


def _count(number: int | str, unit: str) -> str:
    return f"{number} {unit}" if unit.endswith("ed") else f"{number} {unit}s"


def show_value(value: float) -> str:
    """Return ``value`` with four significant digits, without needless zeros."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:.4g}"


def show_duration(seconds: float) -> str:
    """Return ``seconds`` as ``42s``, ``3m05s`` or ``2h07m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def spark_line(values: deque[float]) -> str:
    """Return ``values`` as bars from the lowest to the highest; NaN is a gap."""
    finite = [value for value in values if value == value]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(
        " " if value != value else _BARS[round((value - low) * scale)] for value in values
    )
