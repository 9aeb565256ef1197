"""How near decoding comes to reading the weights once per step, for tools/bench_engine.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from bench_engine_models import Subject
from bench_engine_workload import Workload, requests_of
from bench_figures import Figure, bests

from npr_megatron.engine.interface import Engine

_PROMPT_TOKENS = 32
_STEPS_BEFORE = 16
"""Steps that are not timed: they compute the prompts and capture what is captured."""


def floor_figures(
    subject: Subject, batches: Sequence[int], num_steps: int, copied_bytes: int, repeats: int
) -> list[Figure]:
    """Return, per batch, (seconds to read the weights) / (seconds per decode step).

    A step has to read every weight but the embedding table, of which it takes a few rows. How fast
    that can be is measured by a copy of ``copied_bytes`` in the same run. Keys and values are read
    on top of it; the floor leaves them out, and contexts stay short.
    """
    bytes_per_s = _copy_bandwidth(subject, copied_bytes, repeats)
    figures = [Figure("memory bandwidth, by copy", bytes_per_s / 1e9, "GB/s")]
    for batch in batches:
        engine = subject.engine(batch, has_end=False)
        floor_s = _read_bytes(engine, subject) / bytes_per_s
        step_s = _decode_step_s(engine, subject, batch, num_steps, repeats)
        detail = f"{1e3 * step_s:.2f} ms per step, floor {1e3 * floor_s:.2f} ms"
        name = f"weight-read floor / decode step, batch {batch}"
        figures.append(Figure(name, floor_s / step_s, detail=detail))
        del engine  # its weights leave the device before the next one's arrive
    return figures


def _read_bytes(engine: Engine, subject: Subject) -> int:
    storages = dict(engine.weights)
    if not subject.model.tie_word_embeddings:
        del storages["embed_tokens.weight"]
    return sum(storage.nbytes for storage in storages.values())


def _copy_bandwidth(subject: Subject, num_bytes: int, repeats: int) -> float:
    """Return bytes read and written per second."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=subject.device)
    target = torch.empty_like(source)
    (seconds,) = bests((lambda: target.copy_(source),), 5 * repeats, subject.now)
    return 2 * num_bytes / seconds


def _decode_step_s(
    engine: Engine, subject: Subject, batch: int, num_steps: int, repeats: int
) -> float:
    """Return the median seconds of a step in which each of ``batch`` trajectories takes a token."""
    steps_s: list[float] = []
    for _ in range(repeats):
        lengths = [_STEPS_BEFORE + num_steps + batch] * batch
        for request in requests_of(Workload.of([_PROMPT_TOKENS] * batch, lengths)):
            engine.add(request)
        for _ in range(_STEPS_BEFORE):
            engine.step()
        started = subject.now()
        for _ in range(num_steps):
            engine.step()
        steps_s.append((subject.now() - started) / num_steps)
        while engine.num_unfinished:
            engine.step()
    return statistics.median(steps_s)
