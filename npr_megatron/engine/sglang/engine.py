"""The engine that computes with SGLang: the same trajectories, by stages.

SGLang runs in a process of its own (``host``), driven from a thread of this one that never waits
for a caller. Everything that looks at flows happens in that thread; callers of ``step`` are handed
what it posted: events for their listeners and trajectories that ended.

Weights lie twice in host memory that SGLang's ranks map (``weights``); a push fills one copy while
the other one is served, and the ranks take their parts between two stages.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.engine_check import DeviceType, engine_problems
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.events import Event
from npr_megatron.engine.flow.flow import Flow, Teacher
from npr_megatron.engine.intake import refusals
from npr_megatron.engine.interface import Engine
from npr_megatron.engine.sglang.client.conductor import Conductor
from npr_megatron.engine.sglang.client.jobs import Era, FlowJob, ScoreJob
from npr_megatron.engine.sglang.client.reservations import (
    room_problems,
    slots_of,
    usable_slots,
)
from npr_megatron.engine.sglang.client.server import Server
from npr_megatron.engine.sglang.client.stages import draw_problems
from npr_megatron.engine.sglang.client.stops import Stops
from npr_megatron.engine.sglang.client.switch import Switch
from npr_megatron.engine.sglang.client.thread import LoopThread, Mailbox
from npr_megatron.engine.sglang.folder import EngineFolder
from npr_megatron.engine.sglang.options import (
    server_environment,
    server_options,
    usable_cores,
    write_model_folder,
)
from npr_megatron.engine.sglang.stage import StageResult
from npr_megatron.engine.sglang.weights.pushed_weights import PushedWeights
from npr_megatron.engine.stats import EngineStats
from npr_megatron.errors import (
    ConfigError,
    EnvironmentFault,
    InputError,
    NprError,
    StaleWeightsError,
)
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import FinishReason, FloatArray, Trajectory
from npr_megatron.schema.grammar import Grammar
from npr_megatron.schema.tags import Vocabulary

T = TypeVar("T")

_STEP_S = 0.1
"""How long a step waits for news."""


class SglangEngine(Engine):
    """Decodes requests with SGLang under live weights.

    Starting it takes SGLang's start-up time. It holds no weights until ``load`` or ``commit``.

    Args:
        model: architecture; ``max_position_embeddings`` bounds prompt and critical path together.
        config: pool size, concurrency, dtype, and what only SGLang has.
        vocabulary: ids of tags and of the end token; its index ids beyond ``config.max_plans`` are
            not used.
        device: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: SGLang cannot do what is configured; lists every reason.
        EnvironmentFault: SGLang does not start.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        vocabulary: Vocabulary,
        *,
        device: DeviceType = "cpu",
    ) -> None:
        if problems := engine_problems(config, model, device):
            raise ConfigError(problems)
        self._model = model
        self._config = config
        self._grammar = Grammar(
            replace(vocabulary, index_ids=vocabulary.index_ids[: config.max_plans])
        )
        self._stops = Stops.of(self._grammar)
        self._era = Era(-1)
        self._jobs: dict[str, FlowJob] = {}
        """Every unfinished request; touched by the caller's thread only."""
        self._num_jobs = 0
        self._num_answers = 0
        self._mailbox = Mailbox()
        self._waiting: set[asyncio.Task[Any]] = set()
        """What callers wait for in the loop's thread."""
        self._is_closed = False
        self._folder = EngineFolder()
        self._thread = LoopThread("sglang")
        write_model_folder(model, config, self._folder.path)
        self._server = Server(
            server_options(model, config, device, self._folder.path),
            server_environment(config, device, usable_cores(), os.environ),
            self._folder.path / "sglang.log",
            self._take,
            self._fail,
        )
        self._conductor = Conductor(config, usable_slots(config), self._server)
        self._weights = PushedWeights(model, config, self._beside)
        self._switch = Switch(
            config.kv_after_push,
            self._weights,
            self._conductor,
            self._era,
            run=lambda coroutine: self._thread.run(self._unless_lost(coroutine)),
            beside=self._beside,
            unfinished=lambda: [job for job in self._jobs.values() if not job.is_done],
        )
        try:
            self._thread.run(self._server.start(config.sglang.start_timeout_s))
            self._weights.require_layout()
        except BaseException:
            self.close()
            raise

    # Requests

    @property
    def unfinished(self) -> Collection[str]:
        """Ids of the requests that a later ``step`` will return."""
        return self._jobs.keys()

    @property
    def progress(self) -> int:
        """Answers of SGLang so far."""
        return self._num_answers

    def problems(self, request: GenerationRequest) -> list[str]:
        """Return one sentence for each reason why ``add`` would refuse ``request``."""
        problems = refusals(request, self._model, self._config, self.unfinished)
        return problems or draw_problems(request) + room_problems(request, self._config)

    def add(
        self,
        request: GenerationRequest,
        teacher: Teacher | None = None,
        listener: Callable[[Event], None] | None = None,
    ) -> None:
        """Queue a request; see :meth:`Engine.add`. A teacher is asked ahead of time, for every
        token that a stage may sample.
        """
        self._mailbox.require_sound()
        if problems := self.problems(request):
            raise InputError("\n".join(problems))
        self._num_jobs += 1
        job = FlowJob(
            Flow(request, self._grammar, self._grammar.vocabulary.eos, teacher),
            self._conductor,
            self._stops,
            self._era,
            age=self._num_jobs,
            num_slots=slots_of(request, self._config),
            post=self._mailbox.post,
            listener=listener,
            routed=self._model if self._config.record_routes and self._model.moe else None,
        )
        self._jobs[request.request_id] = job
        self._thread.ask(lambda: self._enter(job))

    def _enter(self, job: FlowJob) -> None:
        timeout_s = job.flow.request.timeout_s
        if timeout_s is not None:
            loop = asyncio.get_running_loop()
            job.deadline = loop.call_later(timeout_s, self._end, job, FinishReason.TIMEOUT)
        self._conductor.enter(job)

    def step(self) -> list[Trajectory]:
        """Wait a moment for news; tell listeners, and return the trajectories that ended.

        Raises:
            StaleWeightsError: no weights were loaded.
            EnvironmentFault: SGLang has ended.
        """
        self._require_weights()
        ended: list[Trajectory] = []
        for news in self._mailbox.collect(_STEP_S if self._jobs else 0.0):
            if news.listener is not None:
                for event in news.events:
                    news.listener(event)
            if news.trajectory is not None:
                del self._jobs[news.request_id]
                ended.append(news.trajectory)
        if self._config.debug_checks:
            self._thread.ask(self._conductor.check_integrity)
        return ended

    def abort(self, request_id: str) -> None:
        """End a request; see :meth:`Engine.abort`."""
        job = self._job(request_id, "aborted")
        self._thread.ask(lambda: self._end(job, FinishReason.ABORTED))

    def preempt(self, request_id: str) -> None:
        """Take the memory of a running request; see :meth:`Engine.preempt`."""
        job = self._job(request_id, "preempted")
        self._thread.ask(lambda: None if job.is_done else self._conductor.preempt(job))

    def score(self, trajectories: Sequence[Trajectory]) -> list[FloatArray]:
        """Return, per trajectory, [T] fp32 log-probs under the live weights; see
        :meth:`Engine.score`.

        Raises:
            StaleWeightsError: no weights were loaded.
            InputError: a trajectory does not fit the pool, or is not laid out canonically; nothing
                was scored.
        """
        self._require_weights()
        jobs: list[ScoreJob] = []
        for trajectory in trajectories:
            self._num_jobs += 1
            jobs.append(ScoreJob(trajectory, self._conductor, self._config, age=self._num_jobs))
        self._thread.run(self._unless_lost(self._score(jobs)))
        return [job.logprobs for job in jobs]

    async def _score(self, jobs: Sequence[ScoreJob]) -> None:
        for job in jobs:
            self._conductor.enter(job)
        for job in jobs:
            await job.done.wait()

    # State

    def stats(self) -> EngineStats:
        """Return what the engine holds and has done."""
        return self._thread.ask(self._stats)

    def _stats(self) -> EngineStats:
        conductor = self._conductor
        return EngineStats.of(
            conductor.counts,
            num_running=conductor.num_running,
            num_waiting=conductor.num_waiting,
            num_kv_slots_held=conductor.num_held,
            num_kv_slots_idle=0,  # SGLang keeps idle prompts where nobody here sees them
        )

    @property
    def host_pid(self) -> int:
        """Process id of the one in which SGLang lives; its children do the work."""
        return self._server.pid

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless all room is free, or reserved for trajectories that run
        or whose leases are about to end; and, when there is no request, unless SGLang itself has
        given back all that was leased. It checks its pool whenever it is idle.
        """
        self._mailbox.require_sound()
        self._thread.ask(self._conductor.check_integrity)
        if not self._jobs:
            self._thread.run(self._unless_lost(self._conductor.audit()))

    def close(self) -> None:
        """End SGLang and all its processes; safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self._mailbox.fail(EnvironmentFault("the engine was used after close(); make another one"))
        self._thread.run(self._server.close())
        self._thread.close()
        self._weights.close()
        self._folder.close()

    # Weights

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """What is served, by storage name, in the layout of one rank. Read only."""
        return self._weights.served

    @property
    def weight_version(self) -> int:
        """Version of the live weights; -1 until some are loaded."""
        return self._weights.version

    def load(self, weights: Mapping[str, Tensor], version: int = 0) -> None:
        """Replace all weights at once; see :meth:`Engine.load`.

        Raises:
            LayoutError: a storage is missing, unknown or of another shape; nothing was replaced.
            DivergenceError: a storage holds NaN or infinity; nothing was replaced.
            EnvironmentFault: SGLang did not take them; the engine is of no use any more.
        """
        self._mailbox.require_sound()
        self._weights.stage(weights)
        self._take_over(version)

    def staging(self) -> dict[str, Tensor]:
        """Return the shadow storages, to be filled by the caller while decoding goes on."""
        return self._weights.staging()

    def seal(self) -> None:
        """Check what was staged beforehand; see :meth:`Engine.seal`."""
        self._weights.seal()

    def commit(self, version: int) -> None:
        """Make the staged weights live; see :meth:`Engine.commit`.

        Raises:
            StaleWeightsError: nothing was staged, or ``version`` is not newer than the live one.
            DivergenceError: what was staged holds NaN or infinity. Nothing has changed then.
            EnvironmentFault: SGLang did not take them; the engine is of no use any more.
        """
        self._mailbox.require_sound()
        if version <= self.weight_version:
            raise StaleWeightsError(
                f"version {version} was to be committed over version {self.weight_version}; "
                "publish versions in increasing order"
            )
        self._take_over(version)

    def _take_over(self, version: int) -> None:
        self._weights.prepare(version)  # raises before anything is given up
        try:
            self._switch.to(version)
        except NprError as error:
            self._mailbox.fail(error)  # ranks may hold a mixture
            raise

    def _beside(self, function: Callable[..., Coroutine[Any, Any, T]], *arguments: object) -> T:
        """Run a coroutine function beside SGLang's tokenizer manager."""
        return self._thread.run(self._server.call(function, *arguments))

    def _require_weights(self) -> None:
        self._mailbox.require_sound()
        if self.weight_version < 0:
            raise StaleWeightsError(
                "the engine was asked to compute, but holds no weights; "
                "call load, or staging and commit"
            )

    # In the loop's thread

    async def _unless_lost(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return what ``coroutine`` returns; raise what makes the engine useless meanwhile."""
        task = asyncio.ensure_future(coroutine)
        self._waiting.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            self._mailbox.require_sound()
            raise
        finally:
            self._waiting.discard(task)

    def _fail(self, error: Exception) -> None:
        """Raise ``error`` to whoever waits, and to every later caller."""
        self._mailbox.fail(error)
        for task in self._waiting:
            task.cancel()

    def _take(self, number: int, answer: StageResult) -> None:
        self._num_answers += 1
        if not self._mailbox.is_sound:
            return  # a flow may have been left half changed
        try:
            self._conductor.take(number, answer)
        except Exception as error:  # noqa: BLE001 - kept, and raised to every later caller
            self._fail(error)

    def _end(self, job: FlowJob, reason: FinishReason) -> None:
        if not job.is_done:
            job.end(reason)
            self._conductor.settle(job)

    def _job(self, request_id: str, what: str) -> FlowJob:
        self._mailbox.require_sound()
        job = self._jobs.get(request_id)
        if job is None:
            raise InputError(
                f"request {request_id} was to be {what}, but it is none of the {len(self._jobs)} "
                "unfinished ones; name a request that was added and not yet returned"
            )
        return job
