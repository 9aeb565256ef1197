"""In which messages the copies of a plan travel between processes. Pure: no tensor, no group.

Executors that send (gloo, NCCL) carry out round after round: in each, a process posts all its
receives and sends and waits for them. A process enters round n only after its own round n - 1, so
by induction nobody waits in a ring. Every process derives the same rounds from the plan.

Within a round no process stages more than its budget in either direction, and a message holds
elements of one dtype. Receivers are taken in turn, each sender starting with another one, so that
no receiver is hit by all senders at once.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from npr_megatron.weights.plans.copies import Copy, element_bytes
from npr_megatron.weights.tiles import PinnedDtype

Route = tuple[int, int]
"""Sending and receiving process."""

_PARTS_PER_BUDGET = 4
"""Copies above this share of the budget are cut by rows, else little of the budget gets used."""


@dataclass(frozen=True, slots=True)
class Message:
    """What one process sends another in one round: packed back to back in the order of copies."""

    sender: int
    receiver: int
    dtype: PinnedDtype | None
    """Of every element; None: that of the weights."""
    copies: tuple[Copy, ...]
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Elements of all copies."""
        return sum(copy.num_elements for copy in self.copies)


Round = tuple[Message, ...]
"""Messages that travel at the same time, at most one from a process to another."""


def message_rounds(
    copies: Iterable[Copy],
    *,
    source_processes: Sequence[int],
    target_processes: Sequence[int],
    message_bytes: int,
    weight_bytes: int,
) -> list[Round]:
    """Return the rounds that carry out ``copies``, without those that stay inside a process.

    Args:
        source_processes: process that holds each rank which copies read; for shares, that of each
            target rank.
        target_processes: process that holds each rank which copies write.
        message_bytes: staging budget of a process in each direction; a single row above it
            travels alone.
        weight_bytes: bytes of an element whose dtype is not pinned.

    Example:
        One sender, two receivers and a small budget: the receivers get messages in turn.
    """
    waiting: defaultdict[Route, deque[_Part]] = defaultdict(deque)
    for copy in copies:
        route = (source_processes[copy.source_rank], target_processes[copy.target_rank])
        if route[0] != route[1]:
            waiting[route] += _parts(copy, max(1, message_bytes // _PARTS_PER_BUDGET), weight_bytes)
    rounds: list[Round] = []
    while waiting:
        rounds.append(_next_round(waiting, len(rounds), message_bytes))
    return rounds


@dataclass(frozen=True, slots=True)
class _Part:
    copy: Copy
    num_bytes: int


def _parts(copy: Copy, limit: int, weight_bytes: int) -> Iterator[_Part]:
    """Cut a copy by rows into parts of at most ``limit`` bytes, at least one row each."""
    height = copy.shape[0]
    num_bytes = copy.num_elements * element_bytes(copy.dtype, weight_bytes)
    if num_bytes <= limit:
        yield _Part(copy, num_bytes)
        return
    step = max(1, limit * height // num_bytes)
    for row in range(0, height, step):
        stop = min(row + step, height)
        yield _Part(copy.rows(row, stop), num_bytes // height * (stop - row))


def _next_round(waiting: defaultdict[Route, deque[_Part]], number: int, budget: int) -> Round:
    """Take the next round out of ``waiting``; always something, so the rounds come to an end."""
    room_out: defaultdict[int, int] = defaultdict(lambda: budget)
    room_in: defaultdict[int, int] = defaultdict(lambda: budget)
    messages: list[Message] = []
    for sender, receiver in _in_turn(waiting, number):
        room = min(room_out[sender], room_in[receiver])
        parts = _take(waiting[(sender, receiver)], room, untouched=room == budget)
        if not waiting[(sender, receiver)]:
            del waiting[(sender, receiver)]
        if parts:
            num_bytes = sum(part.num_bytes for part in parts)
            room_out[sender] -= num_bytes
            room_in[receiver] -= num_bytes
            copies = tuple(part.copy for part in parts)
            messages.append(Message(sender, receiver, copies[0].dtype, copies, num_bytes))
    return tuple(messages)


def _in_turn(routes: Iterable[Route], number: int) -> list[Route]:
    """Order routes so that senders begin with different receivers, in each round with others."""
    senders = {process: index for index, process in enumerate(sorted({s for s, _ in routes}))}
    receivers = {process: index for index, process in enumerate(sorted({r for _, r in routes}))}

    def turn(route: Route) -> tuple[int, int]:
        sender, receiver = senders[route[0]], receivers[route[1]]
        return (receiver - sender - number) % len(receivers), (sender - number) % len(senders)

    return sorted(routes, key=turn)


def _take(parts: deque[_Part], room: int, *, untouched: bool) -> list[_Part]:
    """Take leading parts of one dtype that fit into ``room``; one more if it is untouched."""
    taken: list[_Part] = []
    while parts and parts[0].copy.dtype == (taken or parts)[0].copy.dtype:
        too_large = parts[0].num_bytes > room
        if too_large and not (untouched and not taken):
            break
        room -= parts[0].num_bytes
        taken.append(parts.popleft())
    return taken
