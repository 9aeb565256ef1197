"""Tokenising on all cores of a node: the same samples in the same order, whoever laid them out.

Laying out a sample of 1,400 tokens takes about fifty times as long as handing it from process to
process, and all other ranks wait for it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context

from npr_megatron.data.conversations import Exchange
from npr_megatron.data.rows import Fault
from npr_megatron.data.tokenising import ExchangeReader, Tokenised, read_here
from npr_megatron.errors import EnvironmentFault
from npr_megatron.runtime.child_process import leave_rank

_CHUNK = 64
_MOST = 32
"""One process reads the rows and writes the samples of all."""

_Found = list[Tokenised | Fault]
_own: list[ExchangeReader] = []
"""In a process of the crew: its reader."""


def read_together(
    reader: ExchangeReader,
    exchanges: Iterable[Exchange | Fault],
    num_processes: int | None = None,
) -> Iterator[Tokenised | Fault]:
    """Yield what ``reader`` makes of each exchange, in order; faults are handed on.

    A handful is read here, more by ``num_processes`` forked ones (None: one for each core).

    Raises:
        EnvironmentFault: one of them was killed.
    """
    stream = iter(exchanges)
    yield from read_here(reader, islice(stream, 2 * _CHUNK))
    chunks = iter(lambda: list(islice(stream, _CHUNK)), [])
    first = next(chunks, None)
    if first is None:
        return
    count = num_processes or min(len(os.sched_getaffinity(0)), _MOST)
    with ProcessPoolExecutor(
        count, get_context("fork"), initializer=_join, initargs=(reader, os.getpid())
    ) as crew:
        pending: deque[Future[_Found]] = deque([crew.submit(_read_own, first)])
        try:
            for chunk in chunks:
                pending.append(crew.submit(_read_own, chunk))
                if len(pending) > 3 * count:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        except BrokenProcessPool as error:
            raise EnvironmentFault(
                f"one of {count} processes that tokenise was killed ({error}), for want of memory "
                "perhaps; give the job more, or fewer cores"
            ) from error


def _join(reader: ExchangeReader, parent: int) -> None:
    leave_rank(parent)
    _own.append(reader)


def _read_own(exchanges: list[Exchange | Fault]) -> _Found:
    return [*read_here(_own[0], exchanges)]
