"""Push what changed, over point-to-point messages of a process group, behind an ordinary plan.

Destinations first say which version they hold. A source that keeps the bytes of that version sends
what changed since; anyone else (a late joiner, one that missed a version, one whose last push broke
off) is sent everything in the same form. Messages vary in size, so of each round the sizes travel
before the contents. What arrived is a version only after its digest was checked, hence the order
for callers is::

    exchange.push(...)  ->  digest  ->  chain.confirm  ->  acknowledgement  ->  baseline.advance

Weights are host tensors: sources compare the bytes they serve from the host.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from npr_megatron.errors import LayoutError
from npr_megatron.weights.delta import (
    Baseline,
    Bytes,
    Chain,
    DeltaHeader,
    Held,
    ServedVersion,
    apply_delta,
    encode_delta,
)
from npr_megatron.weights.executors.inproc import RankStorages, copy_boxes
from npr_megatron.weights.executors.point_to_point import InFlight, Transfer
from npr_megatron.weights.messages import Message, Round, Route, message_rounds
from npr_megatron.weights.plan import TransferPlan


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one process sent in one push."""

    sent_bytes: int
    """Contents, sizes and headers."""
    full_bytes: int
    """Elements that the plan has it send, had none been left out."""
    num_full: int
    """Receivers that were sent everything."""


@dataclass(frozen=True, slots=True)
class Sending:
    """The part of a process that holds source ranks."""

    version: ServedVersion
    """What ``storages`` are; the same in all sources."""
    storages: RankStorages
    """Served storages by source layout rank."""
    baseline: Baseline
    """Of the same ranks."""
    is_anchor: bool = False
    """Send everything to everybody."""


@dataclass(frozen=True, slots=True)
class Receiving:
    """The part of a process that holds target ranks."""

    storages: RankStorages
    """By target layout rank; written in place. They hold the bytes that ``chain`` says."""
    chain: Chain


class DeltaExchange:
    """One process's part in the pushes of one plan; all processes of the plan make one each."""

    def __init__(
        self,
        plan: TransferPlan,
        *,
        source_processes: Sequence[int],
        target_processes: Sequence[int],
        dtype: torch.dtype,
        process_group: dist.ProcessGroup,
        timeout_s: float,
        message_bytes: int = 64 * 2**20,
    ) -> None:
        """Divide the plan into messages.

        Args:
            source_processes: rank in ``process_group`` that holds each source layout rank.
            target_processes: likewise for each target layout rank. One process may hold many.
            dtype: of the weights, the same in the whole group; storages may have another one
                pinned.
            timeout_s: deadline of each wait for messages.
            message_bytes: staging memory in each direction, had nothing been left out.
        """
        self._plan_id, self._group, self._timeout_s = plan.plan_id, process_group, timeout_s
        me = self._me = dist.get_rank(process_group)
        rounds = message_rounds(
            plan.copies,
            source_processes=source_processes,
            target_processes=target_processes,
            message_bytes=message_bytes,
            weight_bytes=dtype.itemsize,
        )
        self._rounds = [
            mine
            for one in rounds
            if (mine := tuple(m for m in one if me in (m.sender, m.receiver)))
        ]
        self._inside = [
            copy
            for copy in plan.copies
            if source_processes[copy.source_rank] == me == target_processes[copy.target_rank]
        ]
        messages = [message for one in self._rounds for message in one]
        self._receivers = sorted({m.receiver for m in messages if m.sender == me})
        self._senders = sorted({m.sender for m in messages if m.receiver == me})
        self._full_bytes = sum(m.num_bytes for m in messages if m.sender == me)
        self._num_sent: defaultdict[Route, int] = defaultdict(int)
        self._sent_bytes = 0

    @torch.no_grad()
    def push(self, sending: Sending | None, receiving: Receiving | None) -> Traffic:
        """Bring the targets of the group to the sources' version; all processes call it together.

        Either argument is None in a process that holds no source, or no target, ranks.

        Raises:
            StaleWeightsError: the two sides plan differently or sources send different versions;
                nothing was written.
            EnvironmentFault: a peer did not answer in time. In both cases the chain of a receiver
                that wrote anything holds nothing, and the next push sends it everything.
        """
        self._sent_bytes = 0
        held = self._learn_what_is_held(receiving)
        headers = self._headers(held, sending)
        self._accept(headers, sending, receiving)
        if self._inside:
            copy_boxes(self._inside, _of(sending).storages, _of(receiving).storages)
        for messages in self._rounds:
            bodies = {
                m.receiver: self._body(m, headers[m.receiver], _of(sending))
                for m in messages
                if m.sender == self._me
            }
            received = self._swap_bodies(messages, bodies)
            for message in messages:
                if message.receiver == self._me:
                    body = received[message.sender]
                    apply_delta(body, message.copies, _of(receiving).storages)
        num_full = sum(header.base is None for header in headers.values())
        return Traffic(self._sent_bytes, self._full_bytes, num_full)

    def _learn_what_is_held(self, receiving: Receiving | None) -> dict[int, Held]:
        """Tell senders what is held here; return what the receivers hold."""
        mine = {}
        if self._senders:
            statement = Held(self._plan_id, _of(receiving).chain.held).pack()
            mine = dict.fromkeys(self._senders, _bytes_of(statement))
        answers = self._swap(mine, dict.fromkeys(self._receivers, Held.NUM_BYTES))
        return {receiver: Held.unpack(answer.tobytes()) for receiver, answer in answers.items()}

    def _headers(self, held: Mapping[int, Held], sending: Sending | None) -> dict[int, DeltaHeader]:
        """Return what each receiver is sent: a delta if it holds the baseline, else everything."""
        headers: dict[int, DeltaHeader] = {}
        for receiver, holds in held.items():
            here = _of(sending)
            base = None if here.is_anchor else here.baseline.version
            if holds.version != base:
                base = None
            headers[receiver] = DeltaHeader(self._plan_id, base, here.version)
        return headers

    def _accept(
        self,
        headers: Mapping[int, DeltaHeader],
        sending: Sending | None,
        receiving: Receiving | None,
    ) -> None:
        packed = {receiver: _bytes_of(header.pack()) for receiver, header in headers.items()}
        answers = self._swap(packed, dict.fromkeys(self._senders, DeltaHeader.NUM_BYTES))
        arrived = [DeltaHeader.unpack(answer.tobytes()) for answer in answers.values()]
        if self._inside:
            arrived.append(DeltaHeader(self._plan_id, None, _of(sending).version))
        if arrived:
            _of(receiving).chain.accept(arrived, self._plan_id)

    def _body(self, message: Message, header: DeltaHeader, sending: Sending) -> Bytes:
        base = None if header.base is None else sending.baseline.storages
        return encode_delta(message.copies, sending.storages, base)

    def _swap_bodies(self, messages: Round, bodies: Mapping[int, Bytes]) -> dict[int, Bytes]:
        """Send sizes, then contents; return the contents that arrived, by sender."""
        senders = [m.sender for m in messages if m.receiver == self._me]
        sizes = {to: np.array([len(body)], "<i8").view(np.uint8) for to, body in bodies.items()}
        announced = self._swap(sizes, dict.fromkeys(senders, 8))
        return self._swap(
            bodies, {sender: int(size.view("<i8")[0]) for sender, size in announced.items()}
        )

    def _swap(self, outgoing: Mapping[int, Bytes], incoming: Mapping[int, int]) -> dict[int, Bytes]:
        """Send a buffer to each receiver and return one of a known size from each sender."""
        arrived = {sender: np.empty(size, np.uint8) for sender, size in incoming.items()}
        transfers = [self._transfer((sender, self._me), into) for sender, into in arrived.items()]
        transfers += [self._transfer((self._me, to), body) for to, body in outgoing.items()]
        if transfers:
            InFlight(transfers, self._group).wait(self._timeout_s)
        self._sent_bytes += sum(map(len, outgoing.values()))
        return arrived

    def _transfer(self, route: Route, buffer: Bytes) -> Transfer:
        is_send = route[0] == self._me
        tag = self._num_sent[route]
        self._num_sent[route] += 1
        return Transfer(route[is_send], torch.from_numpy(buffer), tag, is_send)


_Role = TypeVar("_Role")


def _of(role: _Role | None) -> _Role:
    if role is None:
        raise LayoutError(
            "this process holds source or target ranks of the plan, but push was called without "
            "their storages; give what it sends and what it receives"
        )
    return role


def _bytes_of(packed: bytes) -> Bytes:
    return np.frombuffer(bytearray(packed), np.uint8)
