"""All trajectories of one SGLang engine: who waits, who runs, which answer belongs to whom.

Runs on the event loop of the engine and never waits. A request lives one or several *lives* on
SGLang: a life begins when its worst case fits (``reservations``) and ends with the trajectory, or
when SGLang gave up what it had computed, an operator took its memory, or new weights arrived; then
the request queues again, by its age, and goes on from its tokens.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Protocol

from npr_megatron.config.engine import EngineConfig
from npr_megatron.engine.sglang.client.reservations import Reservations
from npr_megatron.engine.sglang.stage import Audit, Stage, StageResult
from npr_megatron.engine.stats import Counts
from npr_megatron.errors import EnvironmentFault

_PIECE_TOKENS = 16
"""Tokens per piece of an answer that nobody watches: how far a stream may run on behind the token
that ended its trajectory."""
_MOST_LIVES_WITHOUT_PROGRESS = 8
_NO_STAGE = Stage(trajectory="nobody", namespace="nobody", token_ids=[0], offset=0)
"""Carries a message to the plugin: leases to end, a question."""


class Worker(Protocol):
    """What one life does: a ``Driver`` or a ``Scorer``."""

    ending: str
    """Why the life is over although its job is not done."""

    def begin(self) -> None:
        """Send the first stages."""
        ...

    def take(self, number: int, answer: StageResult) -> None:
        """Take what SGLang answered."""
        ...

    def stop(self) -> None:
        """Abort all stages."""
        ...


class Job(Protocol):
    """A request over all its lives."""

    age: int
    """Number of its arrival."""
    num_slots: int
    """Its worst case."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """What it shares with others."""
        ...

    @property
    def is_watched(self) -> bool:
        """Whether somebody wants every token at once."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether it needs no further life."""
        ...

    @property
    def progress(self) -> int:
        """Grows with everything that is achieved for good."""
        ...

    @property
    def num_held(self) -> int:
        """Tokens whose keys and values it needs while it runs."""
        ...

    def live(self, name: str) -> Worker:
        """Return the worker of its next life."""
        ...

    def look(self) -> None:
        """Something may have happened."""
        ...


class Link(Protocol):
    """What carries stages to SGLang (``server.Server``)."""

    def ask(self, number: int, stage: Stage, interval: int, rank: int | None) -> None:
        """Send a stage."""
        ...

    def abort(self, number: int) -> None:
        """End a stage early."""
        ...


@dataclass(slots=True, eq=False)
class _Life:
    name: str
    job: Job
    worker: Worker | None = None
    """None while it waits for room."""


@dataclass(slots=True)
class _Asked:
    life: str
    """Empty for a stage of nobody."""
    releases: tuple[str, ...]
    rank: int
    is_wanted: bool = True


class Conductor:
    """Lives, stages and leases.

    Args:
        num_slots: that may be reserved on each data-parallel rank.
    """

    def __init__(self, config: EngineConfig, num_slots: int, link: Link) -> None:
        self._num_ranks = config.sglang.dp_size
        self._reservations = Reservations(num_slots, self._num_ranks, config.max_running)
        self._link = link
        # Where weights change beneath a stage, tokens are told at once: what comes before SGLang
        # says that it took them is of the old version.
        self._piece_tokens = 1 if config.kv_after_push == "keep" else _PIECE_TOKENS
        self._lives: dict[str, _Life] = {}
        self._life_of: dict[int, _Life] = {}
        """By age of the job."""
        self._stalls: dict[int, tuple[int, int]] = {}
        """By age of the job: its progress, and lives that were lost since."""
        self._asked: dict[int, _Asked] = {}
        self._counted: set[int] = set()
        """Jobs whose prompt was counted, by age."""
        self._num_asked = 0
        self._num_lives = 0
        self._is_halted = False
        self._held: list[tuple[int, Stage, int]] | None = None
        """Stages that wait while SGLang is paused; None while it is not."""
        self._audits: dict[int, asyncio.Future[Audit]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.counts = Counts()

    @property
    def num_running(self) -> int:
        """Jobs that have room."""
        return sum(life.worker is not None for life in self._lives.values())

    @property
    def num_held(self) -> int:
        """Tokens whose keys and values jobs need now."""
        return sum(life.job.num_held for life in self._lives.values() if life.worker is not None)

    @property
    def num_waiting(self) -> int:
        """Jobs that wait for room."""
        return len(self._lives) - self.num_running

    # Jobs

    def enter(self, job: Job) -> None:
        """Queue a job."""
        self._queue(job)
        self._proceed()

    def settle(self, job: Job) -> None:
        """Look at a job that somebody else has changed: it may be done."""
        self._settle(self._life_of[job.age])
        self._proceed()

    def preempt(self, job: Job) -> None:
        """Take the room of a job that has some; it queues again."""
        life = self._life_of[job.age]
        if life.worker is not None and not job.is_done:
            self.counts.num_preemptions += 1
            self._again(life)
            self._proceed()

    def _queue(self, job: Job) -> None:
        self._num_lives += 1
        life = _Life(f"{self._num_lives}", job)
        self._lives[life.name] = self._life_of[job.age] = life
        self._reservations.wait(life.name, job.num_slots, job.prompt, job.age)

    def _proceed(self) -> None:
        """Begin lives that fit; have leases ended that stand in the way."""
        if self._is_halted:
            return
        while names := self._reservations.admit():
            for name in names:
                self._begin(self._lives[name])
        for rank in self._reservations.ranks_to_release:
            self._ask("", _NO_STAGE, rank)

    def _begin(self, life: _Life) -> None:
        job = life.job
        if job.age in self._stalls:
            self.counts.num_replayed_tokens += job.progress
        else:
            self._stalls[job.age] = (0, 0)
        life.worker = job.live(life.name)
        life.worker.begin()
        self._settle(life)

    def _settle(self, life: _Life) -> None:
        job = life.job
        job.look()
        if job.is_done:
            self._end(life)
            del self._life_of[job.age]
            self._stalls.pop(job.age, None)
            self._counted.discard(job.age)
        elif life.worker is not None and life.worker.ending:
            self._require_progress(job, life.worker.ending)
            self._again(life)

    def _again(self, life: _Life) -> None:
        self._end(life)
        self._queue(life.job)

    def _end(self, life: _Life) -> None:
        del self._lives[life.name]
        if life.worker is None:
            self._reservations.withdraw(life.name)
        else:
            life.worker.stop()
            self._reservations.leave(life.name)

    def _require_progress(self, job: Job, why: str) -> None:
        progress, num_lost = self._stalls[job.age]
        num_lost = num_lost + 1 if progress == job.progress else 1
        self._stalls[job.age] = (job.progress, num_lost)
        if num_lost > _MOST_LIVES_WITHOUT_PROGRESS:
            raise EnvironmentFault(
                f"SGLang gave up what it had computed for one request {num_lost} times in a row "
                f"without a new token, the last time for this reason: {why}; report this"
            )

    # Stages

    def send(self, life: str, stage: Stage) -> int:
        """Send a stage of a life; its answers come back under the returned number."""
        self._reservations.stage_begun(life)
        return self._ask(life, stage, self._reservations.rank_of(life))

    def abort(self, number: int) -> None:
        """Take no more answers of a stage."""
        asked = self._asked[number]
        asked.is_wanted = False
        if self._held is not None:
            for entry in [entry for entry in self._held if entry[0] == number]:
                self._held.remove(entry)
                self._over(number, asked, has_begun=False)
                return
        self._link.abort(number)

    def take(self, number: int, answer: StageResult) -> None:
        """Take what SGLang answered to a stage."""
        asked = self._asked[number]
        life = self._lives.get(asked.life) if asked.is_wanted else None
        if answer.is_last:
            # A stage that was aborted before its turn has ended no leases.
            self._over(number, asked, has_begun=not answer.refusal)
            if number in self._audits:
                self._audits.pop(number).set_result(Audit.of(answer.refusal))
        elif asked.releases:
            self._reservations.released(asked.releases)
            asked.releases = ()
        if life is not None and life.worker is not None:
            self._count_prompt(life, answer)
            life.worker.take(number, answer)
            self._settle(life)
        self._proceed()

    def _ask(self, life: str, stage: Stage, rank: int) -> int:
        self._num_asked += 1
        number = self._num_asked
        releases = self._reservations.take_releases(rank)
        stage = replace(stage, releases=releases)
        self._asked[number] = _Asked(life, releases, rank)
        self._idle.clear()
        if self._held is None:
            self._pass_on(number, stage, rank)
        else:
            self._held.append((number, stage, rank))
        return number

    def _pass_on(self, number: int, stage: Stage, rank: int) -> None:
        life = self._lives.get(self._asked[number].life)
        interval = 1 if life is not None and life.job.is_watched else self._piece_tokens
        self._link.ask(number, stage, interval, rank if self._num_ranks > 1 else None)

    def _over(self, number: int, asked: _Asked, *, has_begun: bool) -> None:
        del self._asked[number]
        if has_begun:
            self._reservations.released(asked.releases)
        else:
            self._reservations.put_back(asked.rank, asked.releases)
        if asked.life:
            self._reservations.stage_ended(asked.life)
        if not self._asked:
            self._idle.set()

    def _count_prompt(self, life: _Life, answer: StageResult) -> None:
        """Count how much of the prompt the first stage of a request found in the cache."""
        if life.job.age in self._counted:
            return
        self._counted.add(life.job.age)
        num_tokens = len(life.job.prompt) - 1
        self.counts.num_prompt_tokens += num_tokens
        self.counts.num_cached_prompt_tokens += min(answer.num_cached, num_tokens)

    # New weights

    async def halt(self) -> None:
        """Abort everything that is under way; begin nothing until :meth:`resume`."""
        self._is_halted = True
        for life in self._lives.values():
            if life.worker is not None:
                life.worker.stop()
        await self._idle.wait()

    def resume(self) -> None:
        """Go on after :meth:`halt`, when SGLang has forgotten all keys and values: every life that
        had begun is followed by another one.
        """
        self._reservations.flushed()
        for life in [life for life in self._lives.values() if life.worker is not None]:
            del self._lives[life.name]
            self._queue(life.job)
        self._is_halted = False
        self._proceed()

    def hold(self) -> None:
        """Send no stage until :meth:`let_go`."""
        self._held = []

    def let_go(self) -> None:
        """Send the stages that waited."""
        held, self._held = self._held or [], None
        for number, stage, rank in held:
            self._pass_on(number, stage, rank)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless room and stages are those of the lives there are."""
        self._reservations.check_integrity()
        if not self._lives and not self._asked and self._reservations.num_reserved:
            raise AssertionError(
                f"nothing is under way and {self._reservations.num_reserved} slots are reserved"
            )

    async def audit(self) -> None:
        """Raise ``AssertionError`` if SGLang keeps anything from eviction although there is no job;
        waits for what is under way.
        """
        while self._asked:
            await self._idle.wait()
        for rank in range(self._num_ranks):
            number = self._ask("", replace(_NO_STAGE, audits=True), rank)
            answer = self._audits[number] = asyncio.get_running_loop().create_future()
            if (audit := await answer) != Audit(0, 0):
                raise AssertionError(
                    f"there is no request, and rank {rank} of SGLang holds {audit.num_leases} "
                    f"leases and has {audit.num_locked} tokens locked"
                )
