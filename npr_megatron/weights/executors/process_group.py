"""Carry out a plan over point-to-point messages of a torch process group, gloo or NCCL.

For processes that share no memory. Both ends derive the same messages from the plan
(``plans.messages``), so nothing but payload is sent, and every wait has a deadline. While one
round is on the wire the next one is packed and posted; posting never waits, so the argument why
rounds end holds for two at a time. What ranks of a node share goes from one to the other when all
copies are done. Over NCCL the weights never leave the devices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from npr_megatron.weights.executors.inproc import Move, RankStorages, moves_of, run_moves
from npr_megatron.weights.executors.parcels import (
    Parcel,
    Staging,
    parcels_to_receive,
    parcels_to_send,
)
from npr_megatron.weights.executors.point_to_point import InFlight, Transfer
from npr_megatron.weights.plans.copies import Copy
from npr_megatron.weights.plans.messages import Round, Route, message_rounds
from npr_megatron.weights.plans.plan import TransferPlan

MESSAGE_BYTES = 96 * 2**20
"""Staging memory of a round: over loopback gloo, rounds of 32, 64 and 96 MiB came to 0.76, 0.79 and
0.84 of the rate of plain messages (mean over four changes of TP)."""


def exchange(
    plan: TransferPlan,
    *,
    source_processes: Sequence[int],
    target_processes: Sequence[int],
    sources: RankStorages,
    targets: RankStorages,
    dtype: torch.dtype,
    process_group: dist.ProcessGroup,
    timeout_s: float,
    message_bytes: int = MESSAGE_BYTES,
) -> None:
    """Fill this process's target storages once; as ``Exchange``, whose arguments these are."""
    Exchange(
        plan,
        source_processes=source_processes,
        target_processes=target_processes,
        dtype=dtype,
        process_group=process_group,
        message_bytes=message_bytes,
    ).run(sources, targets, timeout_s=timeout_s)


class Exchange:
    """A plan to be carried out again and again: messages are planned, memory is taken once."""

    def __init__(
        self,
        plan: TransferPlan,
        *,
        source_processes: Sequence[int],
        target_processes: Sequence[int],
        dtype: torch.dtype,
        process_group: dist.ProcessGroup,
        message_bytes: int = MESSAGE_BYTES,
    ) -> None:
        """Derive the messages of this process; touches no other one.

        Args:
            source_processes: rank in ``process_group`` that holds each source layout rank.
            target_processes: likewise for each target layout rank. One process may hold many.
            dtype: of the weights, the same in the whole group; storages may have another pinned.
            message_bytes: staging memory of a round in each direction; two rounds are under way.
        """
        self._group, self._me = process_group, dist.get_rank(process_group)
        self._message_bytes, self._weight_bytes = message_bytes, dtype.itemsize
        self._copies = self._work(plan.copies, source_processes, target_processes)
        self._shares = self._work(plan.shares, target_processes, target_processes)
        self._scratch = [_Scratch.of(message_bytes) for _ in range(2)]

    @torch.no_grad()
    def run(self, sources: RankStorages, targets: RankStorages, *, timeout_s: float) -> None:
        """Fill this process's target storages; every process of the group that takes part calls it.

        Args:
            sources: storages held here, by source layout rank.
            targets: storages to fill here, by target layout rank.
            timeout_s: deadline of each round of messages.

        Raises:
            EnvironmentFault: a peer did not answer in time; ``targets`` hold garbage.
        """
        tags: defaultdict[Route, int] = defaultdict(int)
        self._carry(self._copies, sources, targets, tags, timeout_s)
        self._carry(self._shares, targets, targets, tags, timeout_s)

    def _work(
        self,
        copies: Sequence[Copy],
        source_processes: Sequence[int],
        target_processes: Sequence[int],
    ) -> _Work:
        rounds = message_rounds(
            copies,
            source_processes=source_processes,
            target_processes=target_processes,
            message_bytes=self._message_bytes,
            weight_bytes=self._weight_bytes,
        )
        mine = (tuple(m for m in r if self._me in (m.sender, m.receiver)) for r in rounds)
        inside = moves_of(
            copy
            for copy in copies
            if source_processes[copy.source_rank] == self._me == target_processes[copy.target_rank]
        )
        return _Work(tuple(messages for messages in mine if messages), inside)

    def _carry(
        self,
        work: _Work,
        sources: RankStorages,
        targets: RankStorages,
        tags: defaultdict[Route, int],
        timeout_s: float,
    ) -> None:
        under_way: list[_OnTheWire] = []
        for number, messages in enumerate(work.rounds):
            scratch = self._scratch[number % 2].cleared()
            under_way.append(self._send_off(messages, sources, targets, scratch, tags))
            if len(under_way) > 1:
                under_way.pop(0).finish(timeout_s)
        run_moves(work.inside, sources, targets)  # while the last round travels
        for last in under_way:
            last.finish(timeout_s)

    def _send_off(
        self,
        messages: Round,
        sources: RankStorages,
        targets: RankStorages,
        scratch: _Scratch,
        tags: defaultdict[Route, int],
    ) -> _OnTheWire:
        transfers: list[Transfer] = []
        arriving: list[Parcel] = []
        for message in messages:
            route = (message.sender, message.receiver)
            is_send = message.sender == self._me
            if is_send:
                parcels = parcels_to_send(message, sources, scratch.outgoing)
            else:
                parcels = parcels_to_receive(message, targets, scratch.incoming)
                arriving += parcels
            for parcel in parcels:
                tensor = parcel.pack() if is_send else parcel.wire
                peer = message.receiver if is_send else message.sender
                transfers.append(Transfer(peer, tensor, tags[route], is_send))
                tags[route] += 1
        return _OnTheWire(InFlight(transfers, self._group), arriving)


@dataclass(frozen=True, slots=True)
class _Work:
    """What one process has to do for some copies."""

    rounds: tuple[Round, ...]
    """Messages that it sends or receives."""
    inside: tuple[Move, ...]
    """Copies that do not leave it."""


@dataclass(frozen=True, slots=True)
class _Scratch:
    """Memory for one round."""

    outgoing: Staging
    incoming: Staging

    @classmethod
    def of(cls, num_bytes: int) -> _Scratch:
        return cls(Staging(num_bytes), Staging(num_bytes))

    def cleared(self) -> _Scratch:
        """Return it, free to be used for another round."""
        self.outgoing.clear()
        self.incoming.clear()
        return self


@dataclass(frozen=True, slots=True)
class _OnTheWire:
    """A round that was posted."""

    in_flight: InFlight
    arriving: Sequence[Parcel]

    def finish(self, timeout_s: float) -> None:
        self.in_flight.wait(timeout_s)
        for parcel in self.arriving:
            parcel.unpack()
