"""The view of ``npr generate``: answers growing side by side in a terminal, lines elsewhere.

It only shows what it is told and redraws a few times a second at most, between two steps of the
engine, so that it takes no time from decoding worth speaking of.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from npr_megatron.engine.events import Event, FinishEvent, TokenEvent
from npr_megatron.records.trajectory import Trajectory
from npr_megatron.report.live import show_duration
from npr_megatron.report.live_tree import GrowingAnswer, live_tree
from npr_megatron.report.tree import trajectory_tree

_FRAME_S = 0.125
_LINE_S = 5.0
_LINES_PER_ANSWER = 14
"""Height of a growing answer, about."""


class AnswerView:
    """Shows the answers to ``num_answers`` requests.

    Args:
        console: where to.
        num_answers: requests in all.
        keeps_trees: print each answer when it ends; otherwise only how many there are.
        num_there: answers that were there before.
        name_of: request id to what stands above its answer.
    """

    def __init__(
        self,
        console: Console,
        num_answers: int,
        *,
        keeps_trees: bool,
        num_there: int = 0,
        name_of: Callable[[str], str] = str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._num_answers = num_answers
        self._keeps_trees = keeps_trees
        self._num_there = num_there
        self._name_of = name_of
        self._clock = clock
        self._growing: dict[str, GrowingAnswer] = {}
        self._ends: Counter[str] = Counter()
        self._num_tokens = 0
        self._began_s = clock()
        self._shown_s = float("-inf")
        self._line_s = self._began_s
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._num_there:
            self._print(f"{self._num_there} answered before, {self._num_answers} to go")
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._ends:
            self._print(self.closing_line())

    def activity(self, text: str) -> None:
        """Say what is done before the first token."""
        if self._live is not None:
            self._live.update(Text(text, "dim"), refresh=True)

    def take(self, event: Event, text: str = "") -> None:
        """Show ``event``; ``text`` is what a token adds to its stream."""
        answer = self._growing.get(event.request_id)
        if answer is None:
            answer = GrowingAnswer(self._name_of(event.request_id))
            self._growing[event.request_id] = answer
        if self._num_tokens == 0:
            self._began_s = self._clock()
        answer.take(event, text)
        if isinstance(event, TokenEvent):
            self._num_tokens += 1
        elif isinstance(event, FinishEvent):
            del self._growing[event.request_id]
            self._ends[event.trajectory.finish] += 1
            self._shown_s = float("-inf")  # an answer that has ended leaves the picture at once
        self._refresh()

    def show(self, trajectory: Trajectory, pieces: Sequence[str]) -> None:
        """Print an answer that has ended, if this view keeps trees."""
        if self._keeps_trees:
            self._console.print(trajectory_tree(trajectory, pieces))

    def summary(self) -> str:
        """Return how far it has come, how fast it goes and how long it may take."""
        done, seconds = self._ends.total(), self._seconds()
        line = f"{done} of {self._num_answers} answered, {len(self._growing)} growing"
        line += f" | {self._speed()}"
        if 0 < done < self._num_answers:
            rest = seconds / done * (self._num_answers - done)
            line += f" | about {show_duration(rest)} left"
        return line

    def closing_line(self) -> str:
        """Return what came of it."""
        ends = ", ".join(f"{number} {end}" for end, number in self._ends.most_common())
        took = show_duration(self._seconds())
        return f"{self._ends.total()} of {self._num_answers} answered in {took}: {ends}" + (
            f" | {self._speed()}"
        )

    def _seconds(self) -> float:
        return max(self._clock() - self._began_s, 1e-9)

    def _speed(self) -> str:
        return f"{self._num_tokens:,} tokens, {self._num_tokens / self._seconds():,.0f} tokens/s"

    def _refresh(self) -> None:
        now = self._clock()
        if self._live is not None and now - self._shown_s >= _FRAME_S:
            max_answers = max(self._console.height // _LINES_PER_ANSWER, 1)
            picture = live_tree(list(self._growing.values()), self.summary(), max_answers)
            self._live.update(picture, refresh=True)
            self._shown_s = self._clock()
        elif self._live is None and not self._keeps_trees and now - self._line_s >= _LINE_S:
            self._print(self.summary())
            self._line_s = now

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)
