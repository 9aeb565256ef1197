"""Proof that rounds of messages carry out the copies of a plan, however they were cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from npr_megatron.weights.box import Index
from npr_megatron.weights.plans.copies import Copy, element_bytes
from npr_megatron.weights.plans.messages import Message, Round
from npr_megatron.weights.proof.declared import padded
from npr_megatron.weights.proof.intervals import Spans, covered, overlaps
from npr_megatron.weights.tiles import PinnedDtype

_Stream = tuple[int, str, int, str, PinnedDtype | None, Index]
"""Target and source storage, dtype, and how far apart the two ends of a copy lie."""


def verify_messages(
    rounds: Sequence[Round],
    copies: Iterable[Copy],
    *,
    source_processes: Sequence[int],
    target_processes: Sequence[int],
    message_bytes: int,
    weight_bytes: int,
) -> list[str]:
    """Return what is wrong with ``rounds``, one sentence each; empty means proven correct.

    Proven are: every element that leaves its process travels exactly once, from and to the
    processes that hold its ranks; a message has one dtype; in no round does a process stage more
    than ``message_bytes`` in a direction, except for a single row.
    """
    problems: list[str] = []
    for number, one in enumerate(rounds):
        where = f"round {number}"
        routes = Counter((message.sender, message.receiver) for message in one)
        problems += [f"{where}: {n} messages on route {r}" for r, n in routes.items() if n > 1]
        for message in one:
            problems += [
                f"{where}, {message.sender} to {message.receiver}: {problem}"
                for problem in _of_message(
                    message, source_processes, target_processes, weight_bytes
                )
            ]
        problems += [f"{where}: {problem}" for problem in _over_budget(one, message_bytes)]
    leaving = [
        copy
        for copy in copies
        if source_processes[copy.source_rank] != target_processes[copy.target_rank]
    ]
    carried = [copy for one in rounds for message in one for copy in message.copies]
    return problems + _not_carried_once(leaving, carried)


def _of_message(
    message: Message,
    source_processes: Sequence[int],
    target_processes: Sequence[int],
    weight_bytes: int,
) -> Iterable[str]:
    dtypes = {copy.dtype for copy in message.copies}
    if dtypes != {message.dtype}:
        yield f"elements of dtypes {sorted(map(str, dtypes))} in a message of {message.dtype}"
    size = sum(
        copy.num_elements * element_bytes(copy.dtype, weight_bytes) for copy in message.copies
    )
    if size != message.num_bytes:
        yield f"{message.num_bytes} bytes announced, the copies have {size}"
    for copy in message.copies:
        route = (source_processes[copy.source_rank], target_processes[copy.target_rank])
        if route != (message.sender, message.receiver):
            yield f"{copy} belongs on route {route}"


def _over_budget(one: Round, message_bytes: int) -> Iterable[str]:
    staged: Counter[tuple[str, int]] = Counter()
    single_rows: set[tuple[str, int]] = set()
    for message in one:
        for end in (("sends", message.sender), ("receives", message.receiver)):
            if len(message.copies) == 1 and message.copies[0].shape[0] == 1 and not staged[end]:
                single_rows.add(end)
            else:
                single_rows.discard(end)
            staged[end] += message.num_bytes
    for end, size in staged.items():
        if size > message_bytes and end not in single_rows:
            yield f"process {end[1]} {end[0]} {size} bytes, its budget is {message_bytes}"


def _not_carried_once(leaving: Sequence[Copy], carried: Sequence[Copy]) -> list[str]:
    streams: dict[_Stream, int] = {}
    width = max((len(copy.target_start) for copy in (*leaving, *carried)), default=1)
    wanted, found = (_spans(copies, streams, width) for copies in (leaving, carried))
    problems = [
        f"{carried[one]} and {carried[other]} travel both" for one, other in overlaps(found)
    ]
    missing = np.flatnonzero(covered(wanted, found) != wanted.volume)
    problems += [f"{leaving[index]} does not travel, or in part" for index in missing.tolist()]
    foreign = np.flatnonzero(covered(found, wanted) != found.volume)
    return problems + [f"{carried[index]} is not asked for" for index in foreign.tolist()]


def _spans(copies: Sequence[Copy], streams: dict[_Stream, int], width: int) -> Spans:
    """Return what copies write, grouped by stream."""
    group = [streams.setdefault(_stream(copy), len(streams)) for copy in copies]
    low = padded([copy.target_box.start for copy in copies], width, 0)
    high = padded([copy.target_box.stop for copy in copies], width, 1)
    return Spans(np.array(group, np.int64), low, high)


def _stream(copy: Copy) -> _Stream:
    target, source = copy.target_start, copy.source_start
    num_axes = len(copy.shape)
    apart = tuple(a - b for a, b in zip(target[-num_axes:], source[-num_axes:], strict=True))
    leads = (*target[:-num_axes], -1, *source[:-num_axes])
    ends = copy.target_rank, copy.target_storage, copy.source_rank, copy.source_storage
    return (*ends, copy.dtype, (*apart, *leads))
