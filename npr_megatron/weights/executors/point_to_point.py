"""Bytes between two processes of a torch process group, each wait with a deadline.

The same calls serve gloo and NCCL. They differ in how one waits: gloo's ``wait`` takes a timeout
and gives up the connections of the group when it passes; NCCL's only orders streams, so its work is
polled, and a communicator that missed the deadline is aborted. Either way a group that failed is of
no further use. NCCL knows no tags: there, the order of posting is what matches both ends.

The NCCL half was written against torch's documentation and source; no GPU has run it yet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from npr_megatron.errors import EnvironmentFault

_POLL_S = 1e-4


@dataclass(frozen=True, slots=True)
class Transfer:
    """One contiguous tensor that goes to, or comes from, a peer."""

    peer: int
    """Rank in the process group."""
    tensor: Tensor
    """Any dtype; not to be touched before the transfer is done."""
    tag: int
    """Distinguishes transfers between the same two processes; equal at both ends."""
    is_send: bool


class InFlight:
    """Transfers that were posted together."""

    def __init__(self, transfers: Sequence[Transfer], process_group: dist.ProcessGroup) -> None:
        """Post ``transfers``; returns at once.

        Raises:
            EnvironmentFault: a peer is known to be gone.
        """
        self._transfers = transfers  # keeps the tensors alive while the backend uses them
        self._process_group = process_group
        self._is_nccl = dist.get_backend(process_group) == dist.Backend.NCCL
        try:
            self._works = self._post_batch() if self._is_nccl else self._post_each()
        except RuntimeError as error:
            raise self._fault(str(error)) from error

    def wait(self, timeout_s: float) -> None:
        """Return when every transfer is done.

        Raises:
            EnvironmentFault: a peer did not answer within ``timeout_s``, or is gone.
        """
        deadline = time.monotonic() + timeout_s
        try:
            for work in self._works:
                self._wait_for(work, deadline)
        except (RuntimeError, TimeoutError) as error:
            raise self._fault(f"within {timeout_s} s ({error})") from error

    def _post_each(self) -> list[dist.Work]:
        """Post to the group itself: ``dist.isend`` costs as much as 100 KiB on the wire."""
        group = self._process_group
        return [
            (group.send if t.is_send else group.recv)([_as_bytes(t.tensor)], t.peer, t.tag)
            for t in self._transfers
        ]

    def _post_batch(self) -> list[dist.Work]:
        """Post as one NCCL group, within which order does not matter between different peers."""
        return dist.batch_isend_irecv(
            [
                dist.P2POp(
                    dist.isend if t.is_send else dist.irecv,
                    _as_bytes(t.tensor),
                    group=self._process_group,
                    group_peer=t.peer,
                )
                for t in self._transfers
            ]
        )

    def _wait_for(self, work: dist.Work, deadline: float) -> None:
        if not self._is_nccl:
            work.wait(timedelta(seconds=max(deadline - time.monotonic(), 1e-3)))
            return
        while not work.is_completed():
            if time.monotonic() > deadline:
                self._process_group.abort()
                raise TimeoutError("the communicator was aborted")
            time.sleep(_POLL_S)

    def _fault(self, what: str) -> EnvironmentFault:
        to = sorted({t.peer for t in self._transfers if t.is_send})
        by = sorted({t.peer for t in self._transfers if not t.is_send})
        return EnvironmentFault(
            f"weights to {to} and from {by} did not pass {what}; a peer is gone or stuck, start "
            "again without it over a new process group"
        )


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return the same memory as uint8: gloo does not know every dtype."""
    return tensor.view(-1).view(torch.uint8)
