"""The NPR engines as sides of tools/bench_sglang.py."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench_engine_models import VOCABULARY
from bench_engine_parallel import add_taught
from bench_engine_workload import require_equal
from bench_sglang_rollouts import Report, Rollout

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.events import Event, JoinEvent, TokenEvent
from npr_megatron.engine.interface import Engine
from npr_megatron.engine.sglang.client.conductor import Conductor
from npr_megatron.engine.sglang.engine import SglangEngine
from npr_megatron.engine.sglang.options import DeviceType
from npr_megatron.engine.sglang.stage import Stage, StageResult
from npr_megatron.records.trajectory import DecodeMode
from npr_megatron.weights.layouts import EngineKind, engine_layout
from npr_megatron.weights.storages import ReadBox, load_tiles


@dataclass(slots=True)
class Totals:
    """What went into an engine so far; see :class:`Report`."""

    num_known: int = 0
    num_cached: int = 0
    num_sampled: int = 0


class EngineSide(ABC):
    """A caller of an NPR engine."""

    def __init__(
        self, engine: Engine, kind: EngineKind, model: ModelConfig, weights: ReadBox
    ) -> None:
        self._engine = engine
        self._num_generated = 0
        load_tiles(engine_layout(model, engine=kind).ranks[0], weights, engine.staging())
        engine.seal()
        engine.commit(1)

    @abstractmethod
    def _totals(self) -> Totals: ...

    def decode(self, rollouts: Sequence[Rollout], in_flight: int, is_watched: bool) -> Report:
        """Decode ``rollouts``, at most ``in_flight`` at once; see :class:`Report`."""
        report, before = Report(), self._totals()
        before_all = self._num_generated
        waiting = deque(enumerate(rollouts))
        begun_s: dict[str, float] = {}
        started = time.perf_counter()
        while waiting or self._engine.num_unfinished:
            while waiting and self._engine.num_unfinished < in_flight:
                number, rollout = waiting.popleft()
                listener = _JoinWatch(report.joins_s) if is_watched else None
                begun_s[self._add(number, rollout, listener)] = time.perf_counter()
            for trajectory in self._engine.step():
                self._num_generated += trajectory.num_tokens
                report.latencies_s.append(time.perf_counter() - begun_s[trajectory.prompt_id])
        report.seconds = time.perf_counter() - started
        num_planned = sum(len(rollout.response) for rollout in rollouts)
        require_equal(self._num_generated - before_all, num_planned)
        after = self._totals()
        report.num_known = after.num_known - before.num_known
        report.num_cached = after.num_cached - before.num_cached
        num_sampled = after.num_sampled - before.num_sampled
        report.num_computed = report.num_known - report.num_cached + num_sampled
        return report

    def _add(self, number: int, rollout: Rollout, listener: _JoinWatch | None) -> str:
        return add_taught(
            self._engine, rollout.prompt, rollout.response, DecodeMode.PARALLEL, number, listener
        )


class _JoinWatch:
    """Takes the time from the last sampled token of a block to the first one behind it."""

    def __init__(self, joins_s: list[float]) -> None:
        self._joins_s = joins_s
        self._last_s = 0.0
        self._is_joining = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, JoinEvent):
            self._is_joining = True
        elif isinstance(event, TokenEvent) and not event.forced:
            now = time.perf_counter()
            if event.block:
                self._last_s = now
            elif self._is_joining:
                self._joins_s.append(now - self._last_s)
                self._is_joining = False


class EmbeddedSide(EngineSide):
    """Only prompts are sent as known: forks and joins are no requests, they share what is there."""

    def __init__(
        self, model: ModelConfig, config: EngineConfig, device: DeviceType, weights: ReadBox
    ) -> None:
        engine = EmbeddedEngine(model, config, VOCABULARY, device=device)
        super().__init__(engine, "embedded", model, weights)

    def _totals(self) -> Totals:
        stats = self._engine.stats()
        return Totals(stats.num_prompt_tokens, stats.num_cached_prompt_tokens, self._num_generated)


class SglangSide(EngineSide):
    """NPR Engine on SGLang; what its stages find in the cache is counted on their way."""

    def __init__(
        self, model: ModelConfig, config: EngineConfig, device: DeviceType, weights: ReadBox
    ) -> None:
        engine = SglangEngine(model, config, VOCABULARY, device=device)
        self._counts = Totals()
        self._count(engine._conductor)
        super().__init__(engine, "sglang", model, weights)

    def _totals(self) -> Totals:
        return replace(self._counts)

    def _count(self, conductor: Conductor) -> None:
        counts, send, take = self._counts, conductor.send, conductor.take

        def counted_send(life: str, stage: Stage) -> int:
            counts.num_known += len(stage.token_ids)
            return send(life, stage)

        def counted_take(number: int, answer: StageResult) -> None:
            counts.num_cached += answer.num_cached * answer.is_last
            counts.num_sampled += len(answer.token_ids)
            take(number, answer)

        conductor.send, conductor.take = counted_send, counted_take
