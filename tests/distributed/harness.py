"""Run a function on several ranks, each a forked process of a server that has imported Megatron.

The server is clean: a child of the test process itself could not run backward once any test had
(autograd refuses to work across fork). Rendezvous is a file, so nothing needs a port. Warnings are
errors in the ranks too, except those about torch and Megatron themselves.
"""

from __future__ import annotations

import gc
import multiprocessing.context
import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from npr_megatron.runtime.foreign_warnings import silence_foreign_warnings

_PRELOAD = ["npr_megatron.train.rank", "npr_megatron.pipeline.sft_run", "tests.chaos.case"]


def forks() -> multiprocessing.context.ForkServerContext:
    """Return where processes come from that have imported all that is slow to import."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def run_ranks(
    function: Callable[..., Any], world_size: int, folder: Path, *args: Any, timeout_s: float = 120
) -> list[Any]:
    """Return ``function(rank, world_size, init_method, *args)`` of every rank, in rank order.

    Raises:
        AssertionError: a rank raised (its traceback is in the message) or took longer than allowed.
    """
    context = forks()
    folder = folder / f"ranks-{time.monotonic_ns()}"
    folder.mkdir()
    ranks = [
        context.Process(target=_run_rank, args=(function, rank, world_size, folder, args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        _wait(ranks, folder, time.monotonic() + timeout_s)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _wait(ranks: list[Any], folder: Path, deadline: float) -> None:
    while any(process.exitcode is None for process in ranks):
        if any(process.exitcode for process in ranks) or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    if any(process.exitcode != 0 for process in ranks):
        time.sleep(0.3)  # the others' tracebacks usually name the first cause
        failures = [file.read_text() for file in sorted(folder.glob("error-*"))]
        codes = [process.exitcode for process in ranks]
        raise AssertionError(f"ranks ended with {codes}\n" + "\n".join(failures))


def _run_rank(
    function: Callable[..., Any], rank: int, world_size: int, folder: Path, args: tuple[Any, ...]
) -> None:
    gc.freeze()  # Megatron collects garbage at every save and load: 0.4 s over all modules
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            silence_foreign_warnings()
            result = function(rank, world_size, f"file://{folder}/rendezvous", *args)
    except BaseException:  # noqa: BLE001 - whatever it was, the test must report it
        (folder / f"error-{rank}").write_text(f"--- rank {rank}\n{traceback.format_exc()}")
        raise SystemExit(1) from None
    (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
