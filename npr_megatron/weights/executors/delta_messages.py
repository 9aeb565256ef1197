"""Messages of deltas: which concern a process, and buffers of bytes to and from its peers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from npr_megatron.weights.delta import Bytes
from npr_megatron.weights.executors.point_to_point import InFlight, Transfer
from npr_megatron.weights.plans.copies import Copy
from npr_megatron.weights.plans.messages import Round, Route, message_rounds


@dataclass(frozen=True, slots=True)
class Leg:
    """The messages that begin or end in process ``me``, and the copies that stay inside it."""

    me: int
    rounds: tuple[Round, ...]
    inside: tuple[Copy, ...]
    receivers: tuple[int, ...]
    senders: tuple[int, ...]
    full_bytes: int
    """That ``me`` sends, if nothing is left out."""

    @classmethod
    def of(
        cls,
        copies: Sequence[Copy],
        source_processes: Sequence[int],
        target_processes: Sequence[int],
        me: int,
        message_bytes: int,
        weight_bytes: int,
    ) -> Leg:
        """Divide ``copies`` into messages as ``message_rounds`` does and keep those of ``me``."""
        rounds = message_rounds(
            copies,
            source_processes=source_processes,
            target_processes=target_processes,
            message_bytes=message_bytes,
            weight_bytes=weight_bytes,
        )
        mine = [tuple(m for m in one if me in (m.sender, m.receiver)) for one in rounds]
        sent = [message for one in mine for message in one if message.sender == me]
        received = [message for one in mine for message in one if message.receiver == me]
        return cls(
            me,
            tuple(filter(None, mine)),
            tuple(
                copy
                for copy in copies
                if source_processes[copy.source_rank] == me == target_processes[copy.target_rank]
            ),
            tuple(sorted({message.receiver for message in sent})),
            tuple(sorted({message.sender for message in received})),
            sum(message.num_bytes for message in sent),
        )


class Wire:
    """Buffers of bytes to and from peers; counts what is sent."""

    def __init__(self, process_group: dist.ProcessGroup, timeout_s: float) -> None:
        self._group, self._me = process_group, dist.get_rank(process_group)
        self._timeout_s = timeout_s
        self._num_sent: defaultdict[Route, int] = defaultdict(int)
        self.sent_bytes = 0

    def swap(self, outgoing: Mapping[int, Bytes], incoming: Mapping[int, int]) -> dict[int, Bytes]:
        """Send a buffer to each receiver; return one of a known size from each sender."""
        arrived = {sender: np.empty(size, np.uint8) for sender, size in incoming.items()}
        transfers = [self._transfer((sender, self._me), into) for sender, into in arrived.items()]
        transfers += [self._transfer((self._me, to), body) for to, body in outgoing.items()]
        if transfers:
            InFlight(transfers, self._group).wait(self._timeout_s)
        self.sent_bytes += sum(map(len, outgoing.values()))
        return arrived

    def _transfer(self, route: Route, buffer: Bytes) -> Transfer:
        is_send = route[0] == self._me
        tag = self._num_sent[route]
        self._num_sent[route] += 1
        return Transfer(route[is_send], torch.from_numpy(buffer), tag, is_send)
