"""One engine in its own process: a loop that decodes, and calls that reach it between steps.

What changes the engine is handed to its loop (``engine.loop``), so a commit never changes weights
under a half-computed step. Staging alone does not wait: it writes the engine's shadow storages,
which no step reads, while decoding goes on.

An error in the loop is raised to every later caller; the replica does not continue after one.
Nothing here knows the fleet: what a replica is told is decided in ``rollout.push``.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.backends import create_engine, storages_of
from npr_megatron.engine.loop import EngineLoop
from npr_megatron.errors import NprError, StaleWeightsError
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import Trajectory
from npr_megatron.rollout.health import Stamp
from npr_megatron.rollout.holding import Holding
from npr_megatron.schema.tags import Vocabulary
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.tiles import Layout

CALL_THREADS = 5
"""Calls served at once: a waiting ``report``, a stage, a ``settle`` that waits for it, a submission
or commit, and one to spare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """What an engine process must know to come up; picklable."""

    model: ModelConfig
    engine: EngineConfig
    vocabulary: Vocabulary
    source: Layout
    """Layout of the trainer whose publications it will pull."""
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What a replica says when it is asked to leave everything unfinished behind."""

    serving: Stamp | None
    """None while it holds no weights."""
    term: int
    """What orders about weights must quote from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What happened since the last report."""

    finished: bytes
    """Pickled ``list[Trajectory]``. Bytes, because arrays handed out by Ray would pin its small
    object store."""
    progress: int
    """Grows while the engine advances (``Engine.progress``)."""

    def trajectories(self) -> list[Trajectory]:
        """Return the finished trajectories, in the order in which they finished."""
        return pickle.loads(self.finished)


class Replica:
    """An engine with a mailbox. A plain class; ``rollout.fleet`` makes it a Ray actor."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self._spec = spec
        self._changed = threading.Condition()
        self._unfinished: set[str] = set()
        self._finished: list[Trajectory] = []
        self._failure: Exception | None = None

    def start(self) -> int:
        """Build the engine and start its loop; return the process id.

        Not done by ``__init__``: Ray would hide the type of an error raised there.
        """
        spec = self._spec
        self._engine = create_engine(spec.model, spec.engine, spec.vocabulary, spec.device)
        layout = storages_of(spec.model, spec.engine)
        self._holding = Holding(self._engine, spec.source, layout)
        self._loop = EngineLoop(self._engine, on_step=self._take, on_failure=self._end)
        self._loop.start()
        return os.getpid()

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue ``requests``, all or (raising what ``Engine.add`` raises for a bad one) none.

        Raises:
            StaleWeightsError: the replica holds no weights: it has just taken a dead one's seat.
        """

        def add() -> None:
            if self._engine.weight_version < 0:
                raise StaleWeightsError(
                    f"{len(requests)} requests were submitted to a replica that holds no weights; "
                    "push to it first"
                )
            added: set[str] = set()
            try:
                for request in requests:
                    self._engine.add(request)
                    added.add(request.request_id)
            except NprError:
                self._drop(added)
                raise
            self._unfinished |= added

        self._loop.between_steps(add)

    def report(self, wait_s: float) -> Report:
        """Return what finished since the last report: when all is done, or after ``wait_s``."""
        with self._changed:
            self._changed.wait_for(self._has_settled, timeout=wait_s)
            if self._failure is not None:
                raise self._failure
            finished, self._finished = self._finished, []
            progress = self._engine.progress
        return Report(finished=pickle.dumps(finished, protocol=5), progress=progress)

    def stage(self, publication: Publication, term: int) -> Stamp:
        """Copy published weights into the shadow storages and verify them; decoding goes on.

        Returns what is staged; raises what ``Holding.stage`` raises.
        """
        return self._holding.stage(publication, term)

    def commit(self, stamp: Stamp, term: int) -> int:
        """Serve the staged weights from the next step on; raises what ``Holding.commit`` raises.

        Returns:
            Steps that ended while the order waited: 0, or 1 if one was being computed.
        """
        return self._loop.between_steps(lambda: self._holding.commit(stamp, term))

    def drop_staged(self, stamp: Stamp) -> None:
        """Forget the staged weights if they are ``stamp``."""
        self._holding.drop_staged(stamp)

    def settle(self) -> Settled:
        """Leave everything unfinished behind, void all orders about weights, say what is served."""
        term = self._holding.begin_term()
        self.abort()  # runs behind every commit that was under way
        return Settled(serving=self._holding.serving, term=term)

    def lend(self, loan: str, arena_dir: str) -> Publication:
        """Publish what is served for a peer; raises what ``Holding.lend`` raises."""
        return self._holding.lend(loan, arena_dir)

    def end_loan(self, loan: str) -> None:
        """Free what :meth:`lend` took."""
        self._holding.end_loan(loan)

    def abort(self) -> None:
        """Forget every unfinished request and everything finished but not reported."""

        def drop() -> None:
            self._drop(self._unfinished)
            self._unfinished = set()
            with self._changed:
                self._finished = []

        self._loop.between_steps(drop)

    def _drop(self, request_ids: Iterable[str]) -> None:
        """Abort requests; the next step hands them back and :meth:`_take` forgets them."""
        for request_id in request_ids:
            self._engine.abort(request_id)

    def _take(self, finished: list[Trajectory]) -> None:
        """Keep what a step returned of the requests that were not forgotten."""
        results = {request_id_of(trajectory): trajectory for trajectory in finished}
        with self._changed:
            self._finished += [t for name, t in results.items() if name in self._unfinished]
            self._unfinished -= results.keys()
            if self._has_settled():
                self._changed.notify_all()

    def _end(self, failure: Exception) -> None:
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def _has_settled(self) -> bool:
        return self._failure is not None or not (self._unfinished or self._loop.num_pending)


def request_id_of(trajectory: Trajectory) -> str:
    """Return the id of the request that ``trajectory`` answers."""
    return f"{trajectory.prompt_id}#{trajectory.rollout}"
