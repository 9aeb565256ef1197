"""Engine replicas acting as one: push weights to all, decode on all, survive the loss of some.

Invariants:

* Requests go only to replicas that serve the fleet's current version (``rollout.health``).
* A push is all or nothing for the version served: every replica stages and verifies first, then all
  commit. Weights that fail verification raise StaleWeightsError and the old version goes on being
  served.
* A replica that dies or makes no progress for ``request_timeout_s`` is replaced (``rollout.crew``).
  Samples depend on the requests alone, so the results are those of an undisturbed run.
* An error raised by an engine is not a death: it would come again, so it is raised to the caller.

Used from one thread. Ray carries requests and trajectories, never weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

import ray

from npr_megatron.config.engine import EngineConfig, FleetConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.errors import ConfigError, InputError, StaleWeightsError
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import Trajectory
from npr_megatron.rollout.actors import Death, Failure, Seat, gather, outcome
from npr_megatron.rollout.crew import Crew, Deaths, Member
from npr_megatron.rollout.health import Event, ReplicaState, Stamp, judge_silence
from npr_megatron.rollout.replica import ReplicaSpec, Report, request_id_of
from npr_megatron.rollout.router import split_requests
from npr_megatron.schema.tags import Vocabulary
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.tiles import Layout

_REPORT_WAIT_S = 0.25
"""A replica reports at least so often while it decodes: what a death can lose, and the message
rate."""


class Fleet:
    """Context manager over the replicas of a run.

    Example::

        with Fleet(cluster.replica_seats, model, run.engine, run.fleet, vocabulary, source=layout)
        as fleet:
            fleet.push(trainers.publish(version=1))
            trajectories = fleet.generate(requests)
    """

    def __init__(
        self,
        seats: Sequence[Seat],
        model: ModelConfig,
        engine: EngineConfig,
        fleet: FleetConfig,
        vocabulary: Vocabulary,
        *,
        source: Layout,
    ) -> None:
        """Start nothing yet. ``source`` is the layout whose publications :meth:`push` will
        bring."""
        if not seats:
            raise ConfigError("a fleet needs at least one seat, the placement has no replicas")
        self._config = fleet
        spec = ReplicaSpec(
            model=model,
            engine=engine,
            vocabulary=vocabulary,
            source=source,
            device=seats[0].device,
        )
        self._crew = Crew(seats, spec, fleet)

    def __enter__(self) -> Self:
        try:
            self._crew.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all replicas; safe to call twice."""
        self._crew.close()

    @property
    def version(self) -> int:
        """Weight version that is served; -1 before the first push."""
        publication = self._crew.publication
        return -1 if publication is None else publication.version

    @property
    def states(self) -> tuple[ReplicaState, ...]:
        """Health of the replicas, in seat order."""
        return tuple(member.state for member in self._crew.members)

    @property
    def pids(self) -> tuple[int | None, ...]:
        """Process ids of the replicas, in seat order."""
        return tuple(member.pid for member in self._crew.members)

    @property
    def num_restarts(self) -> int:
        """Replicas replaced so far."""
        return self._crew.num_restarts

    def push(self, publication: Publication) -> None:
        """Make every replica serve ``publication``, each between two of its decoding steps.

        Raises:
            StaleWeightsError: a replica's copy is not what was published, or the version is older
                than the one served; nothing was committed.
            EnvironmentFault: replicas die more often than ``max_restarts`` allows.
        """
        self._crew.require_open()
        version = publication.version
        if version <= self.version:
            raise StaleWeightsError(
                f"push of weight version {version} was asked for, version {self.version} is "
                "served; versions only "
                "grow: publish under a newer one"
            )
        staged, dead = self._crew.ask(
            self._crew.members,
            lambda m: m.actor.stage.remote(publication),
            f"staging weight version {version}",
        )
        committed, more = self._crew.ask(
            staged,
            lambda m: m.actor.commit.remote(version),
            f"committing weight version {version}",
        )
        self._crew.publication = publication
        for member in committed:
            stamp = Stamp(version, publication.digest)
            member.state = member.state.after(Event.CAUGHT_UP, serving=stamp)
        self._crew.recover(dead | more)

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        on_finish: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]:
        """Decode ``requests`` on all replicas; return their trajectories in request order.

        ``on_finish`` sees each trajectory as it arrives; it may push. After an exception from it,
        or Ctrl-C, the fleet is ready for the next call.

        Raises:
            InputError: two requests share an id, or an engine refuses one.
            StaleWeightsError: nothing was pushed yet.
            EnvironmentFault: replicas die more often than ``max_restarts`` allows.
        """
        self._require_ready(requests)
        done: dict[str, Trajectory] = {}
        try:
            self._hand_out(requests)
            while len(done) < len(requests):
                for trajectory in self._collect():
                    done[request_id_of(trajectory)] = trajectory
                    if on_finish is not None:
                        on_finish(trajectory)
        finally:
            self._abandon()
        return [done[request.request_id] for request in requests]

    def _require_ready(self, requests: Sequence[GenerationRequest]) -> None:
        if len({request.request_id for request in requests}) != len(requests):
            raise InputError(
                "generate was asked for requests that share an id; (prompt_id, rollout) must be "
                "unique in a call"
            )
        self._crew.require_open()
        if self._crew.publication is None:
            raise StaleWeightsError(
                "generate was asked for, no weights were pushed yet; push first"
            )

    def _hand_out(self, requests: Sequence[GenerationRequest]) -> None:
        publication = self._crew.publication
        assert publication is not None, "_require_ready comes before"
        stamp = Stamp(publication.version, publication.digest)
        members = [m for m in self._crew.members if m.state.is_routable(stamp)]
        shares = split_requests(requests, len(members))
        for member, share in zip(members, shares, strict=True):
            member.pending = {request.request_id: request for request in share}
        self._crew.recover(self._crew.submit(members))

    def _collect(self) -> list[Trajectory]:
        """Wait for the next reports; return what they bring. Replaces members that died or fell
        silent."""
        waiting: dict[ray.ObjectRef, Member] = {}
        for member in self._crew.members:
            if member.pending:
                call = member.report or member.actor.report.remote(_REPORT_WAIT_S)
                member.report = call
                waiting[call] = member
        ray.wait(list(waiting), num_returns=1, timeout=2 * _REPORT_WAIT_S)
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        finished: list[Trajectory] = []
        dead: Deaths = {}
        for call in ready:
            member = waiting[call]
            member.report = None
            answer = outcome(call, f"decoding on {member.name}")
            if isinstance(answer, Failure):  # the engine broke, and would break again
                self._crew.close()
                raise answer.error
            if isinstance(answer, Death):
                dead[member] = answer.cause
            else:
                finished += _take(member, answer)
        self._crew.recover(self._silent(self._crew.members) | dead)
        return finished

    def _silent(self, members: Iterable[Member]) -> Deaths:
        """Judge members that owe trajectories; return those to give up."""
        given_up: Deaths = {}
        for member in members:
            if not member.pending:
                continue
            silent_s = time.monotonic() - member.progress_s
            verdict = judge_silence(silent_s, self._config.request_timeout_s)
            if verdict is Event.DIED:
                given_up[member] = f"no progress for {silent_s:.0f} s"
            elif verdict is not None:
                member.state = member.state.after(verdict)
        return given_up

    def _abandon(self) -> None:
        """Clear what a failed or interrupted generate left behind; a finished one leaves nothing.

        Reports on their way are awaited, else they could swallow what the next generate finishes.
        """
        left = [member for member in self._crew.members if member.pending]
        reports = [member.report for member in left if member.report is not None]
        for member in left:
            member.pending, member.report = {}, None
        _, dead = self._crew.ask(left, lambda m: m.actor.abort.remote(), "aborting")
        gather(reports, timeout_s=self._config.request_timeout_s, what="the last reports")
        self._crew.recover(dead)


def _take(member: Member, report: Report) -> list[Trajectory]:
    if report.num_steps > member.num_steps:
        member.num_steps = report.num_steps
        member.progress_s = time.monotonic()
        member.state = member.state.after(Event.PROGRESSED)
    finished = report.trajectories()
    for trajectory in finished:
        del member.pending[request_id_of(trajectory)]
    return finished
