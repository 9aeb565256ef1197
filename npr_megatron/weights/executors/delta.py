"""Push what changed, over point-to-point messages of a process group, behind an ordinary plan.

Destinations first say which version they hold. A source that keeps the bytes of that version sends
what changed since; anyone else (a late joiner, one that missed a version, one whose last push broke
off) is sent everything in the same form. Ranks of a node that share what arrived do the same among
each other. Messages vary in size, so of each round the sizes travel before the contents. What
arrived is a version only after its digest was checked, hence the order for callers is::

    exchange.push  ->  digest  ->  chain.confirm  ->  acknowledgement  ->  baseline.advance

Weights are host tensors: sources compare the bytes they serve from the host.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from npr_megatron.errors import LayoutError, StaleWeightsError
from npr_megatron.weights.delta import Bytes, apply_delta, encode_delta
from npr_megatron.weights.delta_chain import Baseline, Chain, DeltaHeader, Held, ServedVersion
from npr_megatron.weights.executors.delta_messages import Leg, Wire
from npr_megatron.weights.executors.inproc import RankStorages, copy_boxes
from npr_megatron.weights.plans.copies import Copy
from npr_megatron.weights.plans.plan import TransferPlan


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
    """Send everything to everybody; the same in all sources."""


@dataclass(frozen=True, slots=True)
class Receiving:
    """The part of a process that holds target ranks."""

    storages: RankStorages
    """By target layout rank; written in place. They hold the bytes that ``chain`` says."""
    chain: Chain


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one process sent in one push."""

    sent_bytes: int
    """Contents, sizes and headers."""
    full_bytes: int
    """Elements that the plan has it send, had none been left out."""
    num_full: int
    """Receivers that were sent everything."""


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
        self._plan_id, self._wire = plan.plan_id, Wire(process_group, timeout_s)
        me = dist.get_rank(process_group)
        sizes = (message_bytes, dtype.itemsize)
        self._copies = Leg.of(plan.copies, source_processes, target_processes, me, *sizes)
        self._shares = Leg.of(plan.shares, target_processes, target_processes, me, *sizes)
        self._full_bytes = self._copies.full_bytes + self._shares.full_bytes

    @torch.no_grad()
    def push(self, sending: Sending | None, receiving: Receiving | None) -> Traffic:
        """Bring the targets of the group to the sources' version; all processes call it together.

        Either argument is None in a process that holds no source, or no target, ranks.

        Raises:
            StaleWeightsError: the two sides plan differently or sources send different versions;
                nothing was written. Or a message was damaged.
            EnvironmentFault: a peer did not answer in time. Whenever anything was written, the
                chain of the receiver holds nothing, and the next push sends it everything.
        """
        self._wire.sent_bytes = 0
        held = self._learn_what_is_held(receiving)
        headers = {to: self._header(held[to], _of(sending)) for to in self._copies.receivers}
        arrived = self._swap_headers(headers)
        self._require_one_plan(held)
        if self._copies.inside:  # copied in full, on top of whatever is held
            arrived.append(self._header_inside(_of(sending), _of(receiving)))
        before = _Before()
        if receiving is not None:
            before = self._before_sharing(receiving, held, arrived)
            receiving.chain.accept(arrived, self._plan_id)

        def copied(receiver: int, copies: Sequence[Copy]) -> Bytes:
            here = _of(sending)
            base = None if headers[receiver].base is None else here.baseline.storages
            return encode_delta(copies, here.storages, base)

        def shared(receiver: int, copies: Sequence[Copy]) -> Bytes:
            base = before.storages if receiver in before.receivers else None
            return encode_delta(copies, _of(receiving).storages, base)

        targets = receiving.storages if receiving else {}
        copy_boxes(self._copies.inside, sending.storages if sending else {}, targets)
        self._carry(self._copies, copied, targets)
        copy_boxes(self._shares.inside, targets, targets)
        self._carry(self._shares, shared, targets)
        num_full = sum(header.base is None for header in headers.values())
        num_full += len(self._shares.receivers) - len(before.receivers)
        return Traffic(self._wire.sent_bytes, self._full_bytes, num_full)

    def _learn_what_is_held(self, receiving: Receiving | None) -> dict[int, Held]:
        """Tell those who send to here what is held here; return what others hold, by process."""
        told = sorted({*self._copies.senders, *self._shares.senders})
        asked = sorted({*self._copies.receivers, *self._shares.receivers})
        mine = Held(self._plan_id, _of(receiving).chain.held).pack() if told else b""
        answers = self._wire.swap(
            dict.fromkeys(told, _buffer(mine)), dict.fromkeys(asked, Held.NUM_BYTES)
        )
        return {peer: Held.unpack(answer.tobytes()) for peer, answer in answers.items()}

    def _require_one_plan(self, held: Mapping[int, Held]) -> None:
        """Refuse receivers with another plan, after they were sent headers to refuse likewise."""
        others = {p: one.plan_id for p, one in held.items() if one.plan_id != self._plan_id}
        if others:
            raise StaleWeightsError(
                f"a delta was to be pushed by plan {self._plan_id}, processes have other plans: "
                f"{others}; the layouts of the two sides differ, plan again"
            )

    def _header(self, held: Held, sending: Sending) -> DeltaHeader:
        """Return what a receiver is sent: a delta if it holds the baseline, else everything."""
        base = sending.baseline.version
        if sending.is_anchor or held.version != base:
            base = None
        return DeltaHeader(self._plan_id, base, sending.version)

    def _header_inside(self, sending: Sending, receiving: Receiving) -> DeltaHeader:
        base = None if sending.is_anchor else receiving.chain.held
        return DeltaHeader(self._plan_id, base, sending.version)

    def _swap_headers(self, headers: Mapping[int, DeltaHeader]) -> list[DeltaHeader]:
        outgoing = {receiver: _buffer(header.pack()) for receiver, header in headers.items()}
        incoming = dict.fromkeys(self._copies.senders, DeltaHeader.NUM_BYTES)
        answers = self._wire.swap(outgoing, incoming)
        return [DeltaHeader.unpack(answer.tobytes()) for answer in answers.values()]

    def _before_sharing(
        self,
        receiving: Receiving,
        held: Mapping[int, Held],
        arriving: Sequence[DeltaHeader],
    ) -> _Before:
        """Keep what is shared as it is now, for those peers that hold the same now."""
        mine = receiving.chain.held
        if mine is None or any(header.base is None for header in arriving):
            return _Before()
        receivers = frozenset(to for to in self._shares.receivers if held[to].version == mine)
        kept: defaultdict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        for messages in self._shares.rounds:
            for message in messages:
                for copy in message.copies if message.receiver in receivers else ():
                    name, rank = copy.source_storage, copy.source_rank
                    if name not in kept[rank]:
                        kept[rank][name] = receiving.storages[rank][name].clone()
        return _Before(receivers, kept)

    def _carry(
        self,
        leg: Leg,
        encode: Callable[[int, Sequence[Copy]], Bytes],
        targets: RankStorages,
    ) -> None:
        """Carry out one leg, round by round: sizes, then contents."""
        for messages in leg.rounds:
            incoming = {m.sender: m.copies for m in messages if m.receiver == leg.me}
            bodies = {
                m.receiver: encode(m.receiver, m.copies) for m in messages if m.sender == leg.me
            }
            sizes = {to: np.array([len(body)], "<i8").view(np.uint8) for to, body in bodies.items()}
            announced = self._wire.swap(sizes, dict.fromkeys(incoming, 8))
            received = self._wire.swap(
                bodies, {sender: int(size.view("<i8")[0]) for sender, size in announced.items()}
            )
            for sender, body in received.items():
                apply_delta(body, incoming[sender], targets)


@dataclass(frozen=True, slots=True)
class _Before:
    """What a target rank held before a push, as far as it shares it."""

    receivers: frozenset[int] = frozenset()
    storages: RankStorages | None = None


_Role = TypeVar("_Role")


def _of(role: _Role | None) -> _Role:
    if role is None:
        raise LayoutError(
            "this process holds source or target ranks of the plan, but push was called without "
            "their storages; give what it sends and what it receives"
        )
    return role


def _buffer(packed: bytes) -> Bytes:
    return np.frombuffer(bytearray(packed), np.uint8)
