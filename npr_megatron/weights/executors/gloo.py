"""Carry out a plan over point-to-point messages of a torch process group.

For CPU processes that share no memory. All that one process sends another travels packed, in a few
large messages, because small ones cost gloo most of its bandwidth. Both ends derive the same
messages from the plan, so nothing but payload is sent, and every wait has a deadline.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from npr_megatron.errors import EnvironmentFault
from npr_megatron.weights.executors.inproc import RankStorages, copy_boxes
from npr_megatron.weights.plan import Copy, TransferPlan, below

_Route = tuple[int, int]
"""Sending and receiving process."""


@torch.no_grad()
def exchange(
    plan: TransferPlan,
    *,
    source_processes: Sequence[int],
    target_processes: Sequence[int],
    sources: RankStorages,
    targets: RankStorages,
    process_group: dist.ProcessGroup,
    timeout_s: float,
    message_bytes: int = 64 * 2**20,
) -> None:
    """Fill this process's target storages; every process of the group that takes part calls it.

    Args:
        source_processes: rank in ``process_group`` that holds each source layout rank.
        target_processes: likewise for each target layout rank. One process may hold many.
        sources: storages held here, by source layout rank; all of one dtype in the whole group.
        targets: storages to fill here, by target layout rank.
        timeout_s: deadline of each round of messages.
        message_bytes: staging memory per peer and direction.

    Raises:
        EnvironmentFault: a peer did not answer in time; ``targets`` hold garbage.
    """
    me = dist.get_rank(process_group)
    routes: defaultdict[_Route, list[Copy]] = defaultdict(list)
    for copy in plan.copies:
        route = (source_processes[copy.source_rank], target_processes[copy.target_rank])
        if me in route:
            routes[route].append(copy)
    copy_boxes(routes.pop((me, me), []), sources, targets)
    if not routes:
        return
    dtype = next(iter(next(iter((sources or targets).values())).values())).dtype
    messages = {
        route: list(_messages(copies, max(1, message_bytes // dtype.itemsize)))
        for route, copies in sorted(routes.items())
    }
    for number in range(max(map(len, messages.values()))):
        # A process enters round n only after its round n - 1; by induction nobody waits in a ring.
        due = {route: parts[number] for route, parts in messages.items() if number < len(parts)}
        outgoing = {to: _pack(copies, sources) for (by, to), copies in due.items() if by == me}
        incoming = {
            by: torch.empty(sum(map(_size, copies)), dtype=dtype)
            for (by, to), copies in due.items()
            if to == me
        }
        _transmit(outgoing, incoming, process_group, tag=number, timeout_s=timeout_s)
        for by, buffer in incoming.items():
            _unpack(buffer, due[(by, me)], targets)


def _messages(copies: Iterable[Copy], limit: int) -> Iterator[list[Copy]]:
    """Yield runs of copies of at most ``limit`` elements; a larger row travels alone."""
    message: list[Copy] = []
    room = limit
    for copy in copies:
        for part in _by_rows(copy, limit):
            if _size(part) > room and message:
                yield message
                message, room = [], limit
            message.append(part)
            room -= _size(part)
    if message:
        yield message


def _by_rows(copy: Copy, limit: int) -> Iterator[Copy]:
    height = max(1, limit * copy.shape[0] // _size(copy))
    for row in range(0, copy.shape[0], height):
        yield replace(
            copy,
            source_start=below(copy.source_start, copy.shape, row),
            target_start=below(copy.target_start, copy.shape, row),
            shape=(min(height, copy.shape[0] - row), *copy.shape[1:]),
        )


def _size(copy: Copy) -> int:
    return copy.source_box.num_elements


def _pack(copies: Iterable[Copy], sources: RankStorages) -> Tensor:
    """Return one flat tensor of everything that ``copies`` read."""
    return torch.cat(
        [
            sources[copy.source_rank][copy.source_storage][copy.source_box.slices].flatten()
            for copy in copies
        ]
    )


def _unpack(buffer: Tensor, copies: Sequence[Copy], targets: RankStorages) -> None:
    for copy, part in zip(copies, buffer.split([_size(copy) for copy in copies]), strict=True):
        target = targets[copy.target_rank][copy.target_storage]
        region = target[copy.target_box.slices]
        region.copy_(part.view(region.shape))


def _transmit(
    outgoing: Mapping[int, Tensor],
    incoming: Mapping[int, Tensor],
    process_group: dist.ProcessGroup,
    *,
    tag: int,
    timeout_s: float,
) -> None:
    """Send and receive one buffer per peer; bytes, because gloo does not know every dtype."""
    try:
        waits = [
            dist.irecv(buffer.view(torch.uint8), group=process_group, group_src=peer, tag=tag)
            for peer, buffer in incoming.items()
        ]
        waits += [
            dist.isend(buffer.view(torch.uint8), group=process_group, group_dst=peer, tag=tag)
            for peer, buffer in outgoing.items()
        ]
        for work in waits:
            if work is not None:
                work.wait(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise EnvironmentFault(
            f"weights to {sorted(outgoing)} and from {sorted(incoming)} did not pass within "
            f"{timeout_s} s ({error}); a peer is gone or stuck, start the push again without it"
        ) from error
