"""Engine replicas acting as one: push weights to all, decode on all, survive the loss of some.

Invariants:

* Requests go only to replicas that serve the fleet's current weights (``rollout.push``).
* A push is served by a replica as a whole or not at all, between two of its decoding steps. Who is
  slow or fails is fenced, and the others commit. Weights that nobody could verify raise
  StaleWeightsError and the old ones go on being served.
* A replica that dies, makes no progress for ``request_timeout_s`` or stays silent behind its fence
  for as long is replaced (``rollout.crew``). A newcomer gets the weights from their publication, or
  from another replica once the trainer's memory is gone. Samples depend on the requests alone, so
  the results are those of an undisturbed run.
* An error raised by an engine is not a death: it would come again, so it is raised to the caller.

Used from one thread. Ray carries requests and trajectories, never weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Self

import ray

from npr_megatron.config.engine import EngineConfig, FleetConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.errors import ConfigError, InputError, StaleWeightsError
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import Trajectory
from npr_megatron.rollout.actors import Death, Failure, Seat, gather, outcome
from npr_megatron.rollout.crew import Crew, owed
from npr_megatron.rollout.health import Event, ReplicaState, Stamp, judge_silence
from npr_megatron.rollout.member import Deaths, Member
from npr_megatron.rollout.replica import ReplicaSpec, Report, request_id_of
from npr_megatron.rollout.router import split_requests
from npr_megatron.rollout.serving_record import write_serving
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
        record: Path | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            source: the layout whose publications :meth:`push` will bring.
            record: file that says what is served after every push and every recovery.
        """
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
        self._record = record
        self._recorded: tuple[tuple[ReplicaState, ...], tuple[int | None, ...]] = ((), ())

    def __enter__(self) -> Self:
        try:
            self._crew.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all replicas; safe to call twice."""
        self._crew.close()

    @property
    def version(self) -> int:
        """Weight version that is served; -1 before the first push."""
        serving = self.serving
        return -1 if serving is None else serving.version

    @property
    def serving(self) -> Stamp | None:
        """What is served; None before the first push."""
        return self._crew.courier.swap.serving

    @property
    def states(self) -> tuple[ReplicaState, ...]:
        """Health of the replicas, in seat order."""
        return tuple(self._crew.state(member) for member in self._crew.members)

    @property
    def pids(self) -> tuple[int | None, ...]:
        """Process ids of the replicas, in seat order."""
        return tuple(member.pid for member in self._crew.members)

    @property
    def num_restarts(self) -> int:
        """Replicas replaced so far."""
        return self._crew.num_restarts

    def push(self, publication: Publication) -> None:
        """Make the replicas serve ``publication``, each between two of its decoding steps.

        Returns when every replica that answers within ``push_timeout_s`` serves it.

        Raises:
            StaleWeightsError: no replica got what was published, or the version is not newer than
                the one served; nothing was committed.
            DivergenceError: the weights are not finite; nothing was committed.
            EnvironmentFault: replicas die more often than ``max_restarts`` allows, or none answers.
        """
        self._crew.require_open()
        version = publication.version
        if version <= self.version:
            raise StaleWeightsError(
                f"push of weight version {version} was asked for, version {self.version} is "
                "served; versions only "
                "grow: publish under a newer one"
            )
        try:
            self._crew.push(publication)
        finally:
            self._write_record()

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
        if self.serving is None:
            raise StaleWeightsError(
                "generate was asked for, no weights were pushed yet; push first"
            )

    def _hand_out(self, requests: Sequence[GenerationRequest]) -> None:
        self._crew.require_routable()
        members = self._crew.routable
        shares = split_requests(requests, len(members))
        self._crew.submit(dict(zip(members, shares, strict=True)))

    def _collect(self) -> list[Trajectory]:
        """Wait for the next reports; return what they bring. Replaces members that died or fell
        silent."""
        self._crew.tend()
        if self._crew.courier.orphans:
            self._crew.require_routable()
        waiting: dict[ray.ObjectRef, Member] = {}
        for member in owed(self._crew.members):
            call = member.report or member.actor.report.remote(_REPORT_WAIT_S)
            member.report = call
            waiting[call] = member
        if not waiting:
            return []
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
                finished += self._take(member, answer)
        self._crew.replace(self._silent(self._crew.members) | dead)
        self._write_record()
        return finished

    def _take(self, member: Member, report: Report) -> list[Trajectory]:
        if report.progress > member.progress:
            member.progress = report.progress
            member.progress_s = time.monotonic()
            self._crew.notice(member, Event.PROGRESSED)
        finished = report.trajectories()
        for trajectory in finished:
            del member.pending[request_id_of(trajectory)]
        return finished

    def _silent(self, members: Iterable[Member]) -> Deaths:
        """Judge members that owe trajectories; return those to give up."""
        given_up: Deaths = {}
        for member in owed(members):
            silent_s = time.monotonic() - member.progress_s
            verdict = judge_silence(silent_s, self._config.request_timeout_s)
            if verdict is Event.DIED:
                given_up[member] = f"no progress for {silent_s:.0f} s"
            elif verdict is not None:
                self._crew.notice(member, verdict)
        return given_up

    def _abandon(self) -> None:
        """Clear what a failed or interrupted generate left behind; a finished one leaves nothing.

        Reports on their way are awaited, else they could swallow what the next generate finishes.
        """
        left = owed(self._crew.members)
        reports = [member.report for member in left if member.report is not None]
        for member in left:
            member.pending, member.report = {}, None
        self._crew.courier.orphans = []
        _, dead = self._crew.ask(left, lambda m: m.actor.abort.remote(), "aborting")
        gather(reports, timeout_s=self._config.request_timeout_s, what="the last reports")
        self._crew.replace(dead)

    def _write_record(self) -> None:
        """Say what is served, if that has changed."""
        found = self.states, self.pids
        if self._record is not None and self.states and found != self._recorded:
            self._recorded = found
            write_serving(self._record, self.serving, *found)
