"""Useful tokens per second against HF ``generate`` and SGLang, for tools/bench_engine.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bench_engine_models import Subject, hf_model
from bench_engine_parallel import serve_taught, structured
from bench_engine_sglang import SglangServer, Taken
from bench_engine_workload import Workload, serve, serve_by_hf
from bench_figures import Figure, bests

from npr_megatron.engine.interface import Engine


def hf_figures(
    subject: Subject, folder: Path, batches: Sequence[int], longest: int, repeats: int
) -> list[Figure]:
    """Static batches of HF against the engine: for rollouts, whose branches the engine decodes in
    parallel and HF one token after another, and for plain sampling.

    Plain sampling of spread lengths has the bar. Equal lengths leave a static batch nothing to wait
    for and show what the engine gains by being faster per step alone.
    """
    hf = hf_model(folder)
    figures: list[Figure] = []
    for batch in batches:
        plain, parallel = subject.engine(batch, has_end=False), subject.engine(batch)
        kinds = {"rollouts": structured(8 * batch), **workloads(batch, longest)}
        for kind, workload in kinds.items():
            ours = partial(serve_taught, parallel) if kind == "rollouts" else partial(serve, plain)

            def fresh(run: Callable[[Workload], None], workload: Workload = workload) -> None:
                run(workload.renewed())

            by_hf = partial(serve_by_hf, hf, batch=batch)
            servings = (
                ours,
                partial(by_hf, cache="dynamic"),
                partial(by_hf, cache="static"),
            )
            runs = [partial(fresh, serving) for serving in servings]
            ours_s, dynamic_s, static_s = bests(runs, repeats, subject.now)
            rate = workload.num_tokens / ours_s
            detail = f"{rate:.0f} tokens/s; dynamic cache {dynamic_s / ours_s:.2f}, "
            detail += f"static {static_s / ours_s:.2f}"
            name = f"tokens/s / HF, batch {batch}, {kind}"
            bar = 3.0 if kind == "spread lengths" else None
            figures.append(Figure(name, min(dynamic_s, static_s) / ours_s, "x", bar, False, detail))
    return figures


def workloads(batch: int, longest: int) -> dict[str, Workload]:
    """Return requests for eight times ``batch`` trajectories, of spread and of equal lengths."""
    spread = Workload.spread(8 * batch, longest)
    num_requests = len(spread.lengths)
    equal = Workload.of([56] * num_requests, [spread.num_tokens // num_requests] * num_requests)
    return {"spread lengths": spread, "equal lengths": equal}


def sglang_figures(
    subject: Subject, folder: Path, batches: Sequence[int], longest: int, repeats: int
) -> list[Figure]:
    """SGLang, with or without its overlapped scheduler, whichever is faster.

    By the CPU time of the process that computes. It never sleeps while there are requests, and has
    one core: on a machine with nothing else to do this is the elapsed time, without what passes
    between its processes. Elapsed times, which a busy machine spoils, are in the detail.
    """
    figures: list[Figure] = []
    for batch in batches:
        engine = subject.engine(batch, has_end=False)
        with on_one_core() as core, ExitStack() as stack:
            plain, overlapped = (
                stack.enter_context(SglangServer(folder, batch, core, has_overlap))
                for has_overlap in (False, True)
            )
            runs = [partial(_timed_serve, engine), plain.serve, overlapped.serve]
            workload = workloads(batch, longest)["spread lengths"]
            ours, *theirs = _in_turns(runs, workload, repeats)
        off, on = (taken.cpu_s / ours.cpu_s for taken in theirs)
        elapsed = min(taken.wall_s for taken in theirs) / ours.wall_s
        detail = f"{workload.num_tokens / ours.cpu_s:.0f} tokens/s; "
        detail += f"overlap off {off:.2f}, on {on:.2f}; elapsed {elapsed:.2f}"
        name = f"tokens/s / SGLang, batch {batch}, spread lengths"
        figures.append(Figure(name, min(off, on), "x", 1.5, False, detail))
    return figures


@contextmanager
def on_one_core() -> Iterator[int]:
    """Keep this process on its last core meanwhile, and yield the number of that core."""
    cores = os.sched_getaffinity(0)
    core = max(cores)
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, cores)


def _in_turns(
    runs: Sequence[Callable[[Workload], Taken]], workload: Workload, repeats: int
) -> list[Taken]:
    """Return the least each took of wall and of CPU time, after one run of each to warm up."""
    times: list[list[Taken]] = [[] for _ in runs]
    for number in range(repeats + 1):
        for run, taken in zip(runs, times, strict=True):
            seconds = run(workload.renewed())
            if number:
                taken.append(seconds)
    return [Taken(*map(min, zip(*taken, strict=True))) for taken in times]


def _timed_serve(engine: Engine, workload: Workload) -> Taken:
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    serve(engine, workload)
    return Taken(time.perf_counter() - wall_s, time.process_time() - cpu_s)
