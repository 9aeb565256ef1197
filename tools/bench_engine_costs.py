"""What NPR Engine saves and adds, for tools/bench_engine.py: shared prompts, the work around the
model, and the cost of a long history.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from bench_engine_models import Subject
from bench_engine_workload import Workload, serve
from bench_figures import Figure, bests
from torch import Tensor

from npr_megatron.engine import decode
from npr_megatron.engine.compute.runner import LocalRunner
from npr_megatron.engine.flow.flow import Stream
from npr_megatron.engine.interface import Engine
from npr_megatron.engine.schedule.batch import Batch


def group_figures(
    subject: Subject, prompt_tokens: int, lengths: Sequence[int], repeats: int
) -> list[Figure]:
    """16 rollouts of one prompt against one rollout each of 16 prompts, for response lengths of
    which the first has the bar.
    """
    engine = subject.engine(16, has_end=False)
    figures: list[Figure] = []
    for length in lengths:

        def rollouts(num_prompts: int, length: int = length) -> None:
            drawn = Workload.of([prompt_tokens] * num_prompts, [length] * 16).prompts
            serve(engine, Workload([*drawn] * (16 // num_prompts), [length] * 16))

        apart_s, shared_s = bests(
            [partial(rollouts, 16), partial(rollouts, 1)], repeats, subject.now
        )
        name = f"shared / separate prompts, {prompt_tokens} + {length} tokens"
        bar = 2.0 if length == lengths[0] else None
        figures.append(Figure(name, apart_s / shared_s, "x", bar))
    return figures


class TimedRunner:
    """A runner of one device that notes how long it computes."""

    def __init__(self, subject: Subject, max_running: int) -> None:
        self._runner = LocalRunner(subject.model, subject.config(max_running), subject.device)
        self._now = subject.now
        self.weights = self._runner.weights
        self.device = self._runner.device
        self.score = self._runner.score
        self.agree = self._runner.agree
        self.seconds = 0.0
        """Spent in :meth:`run` so far."""

    def run(self, batch: Batch) -> Tensor:
        """Compute the logits of ``batch``."""
        started = self._now()
        logits_MV = self._runner.run(batch)
        self.seconds += self._now() - started
        return logits_MV


def overhead_figure(subject: Subject, workload: Workload, batch: int, repeats: int) -> Figure:
    """Return the share of the time that is not forward pass and logits: admission, assembling, the
    draw of tokens and their log-probs, bookkeeping. The share of the draw is in the detail.
    """
    runner = TimedRunner(subject, batch)
    engine = subject.engine(batch, has_end=False, runner=runner)
    outside: list[float] = []
    drawing: list[float] = []
    with timed_draws(subject) as draws:
        for _ in range(repeats + 1):
            started, inside, drawn = subject.now(), runner.seconds, draws.seconds
            serve(engine, workload.renewed())
            taken_s = subject.now() - started
            drawing.append(100 * (draws.seconds - drawn) / taken_s)
            outside.append(100 * (1 - (runner.seconds - inside) / taken_s))
    share = statistics.median(outside[1:])
    detail = f"of which the draw {statistics.median(drawing[1:]):.1f} %"
    name = f"outside the model, batch {batch}"
    return Figure(name, share, "%", 15, at_most=True, detail=detail)


@dataclass(slots=True)
class Draws:
    """Time spent drawing tokens."""

    seconds: float = 0.0


@contextmanager
def timed_draws(subject: Subject) -> Iterator[Draws]:
    """Note meanwhile how long engines take to draw tokens from logits."""
    draws, choose = Draws(), decode.choose

    def timed(
        logits_MV: Tensor, streams: Sequence[Stream], known: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        started = subject.now()
        chosen = choose(logits_MV, streams, known)
        draws.seconds += subject.now() - started
        return chosen

    decode.choose = timed
    try:
        yield draws
    finally:
        decode.choose = choose


def history_figure(subject: Subject, young: int, old: int, window: int, chunk: int) -> Figure:
    """Return the growth of the cost per token from ``young`` to ``old`` finished requests.

    Two engines, one that has served so few and one that has served so many, serve the next
    ``window`` requests in turns of ``chunk``: a machine that slows down meanwhile slows both.
    The pool holds a part of the prompts only, so the old engine has idle ones to evict.
    """
    turn = Workload.spread(chunk, 32)
    engines = [_experienced(subject, turn, num_finished) for num_finished in (young, old)]
    costs: list[list[float]] = [[], []]
    for _ in range(window // chunk):
        for engine, taken in zip(engines, costs, strict=True):
            started = subject.now()
            serve(engine, turn.renewed())
            taken.append(subject.now() - started)
    young_s, old_s = map(statistics.median, costs)
    return Figure(
        f"cost per token, {young} -> {old} finished requests",
        100 * abs(old_s / young_s - 1),
        "%",
        10,
        at_most=True,
        detail=f"{1e6 * young_s / turn.num_tokens:.0f} -> {1e6 * old_s / turn.num_tokens:.0f} us",
    )


def _experienced(subject: Subject, turn: Workload, num_finished: int) -> Engine:
    engine = subject.engine(32, has_end=False)
    for _ in range(num_finished // len(turn.lengths)):
        serve(engine, turn.renewed())
    return engine
