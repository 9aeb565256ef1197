"""Carry out a plan over point-to-point messages of a torch process group, gloo or NCCL.

For processes that share no memory. Both ends derive the same messages from the plan
(``weights.messages``), so nothing but payload is sent, and every wait has a deadline. While one
round is on the wire the next one is packed and posted; posting never waits, so the argument why
rounds end holds for two at a time. What ranks of a node share goes from one to the other when all
copies are done. Over NCCL the weights never leave the devices.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist

from npr_megatron.weights.copies import Copy
from npr_megatron.weights.executors.inproc import RankStorages, copy_boxes
from npr_megatron.weights.executors.parcels import Parcel, parcels_to_receive, parcels_to_send
from npr_megatron.weights.executors.point_to_point import InFlight, Transfer
from npr_megatron.weights.messages import Round, Route, message_rounds
from npr_megatron.weights.plan import TransferPlan


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
    message_bytes: int = 64 * 2**20,
) -> None:
    """Fill this process's target storages; every process of the group that takes part calls it.

    Args:
        source_processes: rank in ``process_group`` that holds each source layout rank.
        target_processes: likewise for each target layout rank. One process may hold many.
        sources: storages held here, by source layout rank.
        targets: storages to fill here, by target layout rank.
        dtype: of the weights, the same in the whole group; storages may have another one pinned.
        timeout_s: deadline of each round of messages.
        message_bytes: staging memory of a round in each direction; two rounds are under way.

    Raises:
        EnvironmentFault: a peer did not answer in time; ``targets`` hold garbage.
    """
    post = _Post(process_group, timeout_s, message_bytes, dtype.itemsize)
    post.carry(plan.copies, source_processes, target_processes, sources, targets)
    post.carry(plan.shares, target_processes, target_processes, targets, targets)


class _Post:
    """Carries copies between processes; one per exchange, because tags go on counting."""

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        timeout_s: float,
        message_bytes: int,
        weight_bytes: int,
    ) -> None:
        self._group, self._me = process_group, dist.get_rank(process_group)
        self._timeout_s = timeout_s
        self._message_bytes, self._weight_bytes = message_bytes, weight_bytes
        self._num_sent: defaultdict[Route, int] = defaultdict(int)

    @torch.no_grad()
    def carry(
        self,
        copies: Sequence[Copy],
        source_processes: Sequence[int],
        target_processes: Sequence[int],
        sources: RankStorages,
        targets: RankStorages,
    ) -> None:
        """Carry out those of ``copies`` that begin or end here."""
        rounds = message_rounds(
            copies,
            source_processes=source_processes,
            target_processes=target_processes,
            message_bytes=self._message_bytes,
            weight_bytes=self._weight_bytes,
        )
        under_way: list[_OnTheWire] = []
        for messages in rounds:
            mine = tuple(m for m in messages if self._me in (m.sender, m.receiver))
            if mine:
                under_way.append(self._send_off(mine, sources, targets))
            if len(under_way) > 1:
                under_way.pop(0).finish(self._timeout_s)
        inside = [
            copy
            for copy in copies
            if source_processes[copy.source_rank] == self._me == target_processes[copy.target_rank]
        ]
        copy_boxes(inside, sources, targets)  # while the last round travels
        for last in under_way:
            last.finish(self._timeout_s)

    def _send_off(
        self, messages: Round, sources: RankStorages, targets: RankStorages
    ) -> _OnTheWire:
        transfers: list[Transfer] = []
        arriving: list[Parcel] = []
        for message in messages:
            route = (message.sender, message.receiver)
            is_send = message.sender == self._me
            if is_send:
                parcels = parcels_to_send(message, sources)
            else:
                parcels = parcels_to_receive(message, targets)
                arriving += parcels
            for parcel in parcels:
                tensor = parcel.pack() if is_send else parcel.wire
                peer = message.receiver if is_send else message.sender
                transfers.append(Transfer(peer, tensor, self._num_sent[route], is_send))
                self._num_sent[route] += 1
        return _OnTheWire(InFlight(transfers, self._group), arriving)


class _OnTheWire:
    """A round that was posted."""

    def __init__(self, in_flight: InFlight, arriving: Sequence[Parcel]) -> None:
        self._in_flight, self._arriving = in_flight, arriving

    def finish(self, timeout_s: float) -> None:
        self._in_flight.wait(timeout_s)
        for parcel in self._arriving:
            parcel.unpack()
