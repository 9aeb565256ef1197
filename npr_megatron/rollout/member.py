"""The driver's view of the replica in one seat: its process, what it owes, its pending report."""

from __future__ import annotations

import logging
import time
from typing import Any

import ray

from npr_megatron.records.request import GenerationRequest
from npr_megatron.rollout.actors import Seat
from npr_megatron.rollout.replica import CALL_THREADS, Replica, ReplicaSpec
from npr_megatron.weights.executors.arena import remove_arenas

logger = logging.getLogger(__name__)

_REMOVE_TIMEOUT_S = 5.0


class Member:
    """One process in one seat. A replacement is another member with the same index."""

    def __init__(self, index: int, seat: Seat, spec: ReplicaSpec) -> None:
        self.index = index
        self.seat = seat
        self.pid: int | None = None
        self.term = 0
        """What orders about weights quote (``rollout.holding``)."""
        self.loans: dict[str, str] = {}
        """Copies of its weights that lie ready for peers: name to folder."""
        self._num_loans = 0
        self.pending: dict[str, GenerationRequest] = {}
        """Requests it owes, by id."""
        self.report: ray.ObjectRef | None = None
        """The report that is on its way."""
        self.progress = 0
        """What its last report said of it."""
        self.progress_s = time.monotonic()
        """When it last made progress, or was given work."""
        options = seat.options(max_concurrency=CALL_THREADS)
        self.actor: Any = ray.remote(Replica).options(**options).remote(spec)

    @property
    def name(self) -> str:
        """How people know it."""
        return f"replica {self.index} (pid {self.pid})"

    def lend(self, arena_dir: str) -> tuple[str, ray.ObjectRef]:
        """Have it publish what it serves; return the loan's name and the call."""
        self._num_loans += 1
        loan = f"peer-{self.pid}-{self._num_loans}"
        self.loans[loan] = arena_dir
        return loan, self.actor.lend.remote(loan, arena_dir)

    def end_loan(self, loan: str) -> None:
        """Have it free a loan, without waiting."""
        self.actor.end_loan.remote(loan)
        del self.loans[loan]

    def kill(self) -> None:
        """End the process and free the shared memory it lent, once the kernel took it away."""
        ray.kill(self.actor)
        deadline = time.monotonic() + _REMOVE_TIMEOUT_S
        for loan, arena_dir in self.loans.items():
            while not remove_arenas(arena_dir, loan) and time.monotonic() < deadline:
                time.sleep(0.02)
        self.loans = {}


Deaths = dict[Member, str]
"""Members that are gone or given up, each with the cause in one line."""
