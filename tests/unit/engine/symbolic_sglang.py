"""SGLang as the driver sees it, without a model: stages over a cache whose keys are numbers.

As in ``symbolic``: what a token leaves in the cache is one number, mixed from the token, its
position and everything it reads; a sample and its log-prob are drawn from the number of the token
before it. A stage that finds what it should not, or a join that is put together wrongly, therefore
changes every number behind it. Answers come in random order and in random pieces; what nothing
leases may be lost at any time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from npr_megatron.config.model import MoeConfig
from npr_megatron.engine.flow.flow import Flow
from npr_megatron.engine.flow.segment import linearise
from npr_megatron.engine.sglang.stage import KV_LOST, UNTAUGHT, Stage, StageResult
from npr_megatron.records.trajectory import IntArray, RouteArray, Trajectory
from npr_megatron.topology.layout import predecessors
from npr_megatron.topology.visibility import dense_mask
from tests.engines import TINY
from tests.structures import WORDS
from tests.unit.engine.symbolic import key_of, mix

Row = tuple[int, ...]


def sample(key: np.uint64, stream_key: int, index: int) -> int:
    """What a stream draws behind a token that left ``key``."""
    number = mix(np.array([key ^ np.uint64(stream_key)], np.uint64) + np.uint64(index))[0]
    return WORDS[int(number) % len(WORDS)]


def logprob(key: np.uint64, token_id: int) -> float:
    """How likely ``token_id`` is behind a token that left ``key``; exact in single precision."""
    return -(int(mix(np.array([key + np.uint64(token_id)], np.uint64))[0]) % 4096) / 128 - 1.0


ROUTED = TINY.model_copy(
    update={
        "num_hidden_layers": 3,
        "moe": MoeConfig(
            num_experts=128, num_experts_per_tok=2, moe_intermediate_size=8, num_dense_layers=1
        ),
    }
)
"""A model with experts in two of its three layers."""


def experts(keys: npt.NDArray[np.uint64]) -> RouteArray:
    """[T, layers, K] what computed the tokens that left ``keys``."""
    shifts = np.arange(6, dtype=np.uint64) * np.uint64(7)
    return (keys[:, None] >> shifts & np.uint64(127)).astype(np.int16).reshape(-1, 3, 2)


@dataclass
class _Request:
    stage: Stage
    interval: int
    row: list[int] = field(default_factory=list)
    """Known and sampled tokens."""
    keys: list[np.uint64] = field(default_factory=list)
    """Of the tokens that were computed: all but a sampled last one."""
    has_begun: bool = False
    is_aborted: bool = False

    @property
    def num_sampled(self) -> int:
        return len(self.row) - len(self.stage.token_ids)

    @property
    def has_ended(self) -> bool:
        stage = self.stage
        has_stopped = self.num_sampled > 0 and self.row[-1] in stage.stop_ids
        return has_stopped or self.num_sampled == stage.max_new_tokens


class SymbolicSglang:
    """One data-parallel rank: :meth:`step` answers one of the stages that were sent.

    Args:
        loss_rate: how often everything that nothing leases is lost before an answer.
    """

    def __init__(self, rng: random.Random, loss_rate: float = 0.0) -> None:
        self._rng = rng
        self._loss_rate = loss_rate
        self._open: dict[int, _Request] = {}
        self._cache: dict[str, dict[Row, np.uint64]] = {}
        self._leases: dict[str, list[tuple[str, Row]]] = {}
        self._ended: set[str] = set()
        self.version = 0
        self.num_lost = 0

    # What the conductor calls

    def ask(self, number: int, stage: Stage, interval: int) -> None:
        assert number not in self._open
        assert stage.score_from is None or stage.num_held <= stage.score_from
        assert len(stage.token_ids) > stage.num_held
        assert not stage.join or sum(stage.join) == stage.num_held
        assert stage.trajectory not in self._ended, "a name was used again"
        self._open[number] = _Request(stage, interval)

    def abort(self, number: int) -> None:
        self._open[number].is_aborted = True

    # What tests call

    @property
    def is_idle(self) -> bool:
        return not self._open

    @property
    def num_leases(self) -> int:
        return sum(map(len, self._leases.values()))

    def step(self) -> tuple[int, StageResult]:
        """Return the next piece of some stage's answer, and its number."""
        if self._rng.random() < self._loss_rate:
            self.evict()
        number = self._rng.choice(list(self._open))
        request = self._open[number]
        answer = self._answer(request)
        if answer.is_last:
            del self._open[number]
            self._end(request, answer)
        return number, answer

    def evict(self) -> None:
        """Lose what no lease and no running stage holds."""
        held = [entry for leases in self._leases.values() for entry in leases]
        held += [(r.stage.namespace, tuple(r.row)) for r in self._open.values() if r.has_begun]
        kept: dict[str, dict[Row, np.uint64]] = {}
        for namespace, row in held:
            known, own = self._cache.get(namespace, {}), kept.setdefault(namespace, {})
            own |= {row[:n]: known[row[:n]] for n in range(1, len(row) + 1) if row[:n] in known}
        self._cache = kept

    def forget_leases(self) -> None:
        """Lose even what is leased, as a server does whose leases have timed out."""
        self._leases.clear()
        self.evict()

    def flush(self, version: int) -> None:
        """Forget everything; later keys are those of other weights."""
        assert self.is_idle
        self._cache.clear()
        self._leases.clear()
        self.version = version

    # One answer

    def _answer(self, request: _Request) -> StageResult:
        stage = request.stage
        if request.is_aborted:
            return self._result([], [], refusal="aborted")
        if request.has_begun:
            tokens, logprobs = self._decode(request)
            return self._told(request, self._result(tokens, logprobs, is_last=request.has_ended))
        self._release(stage)
        self._join(stage)
        num_cached = self._begin(request)
        if num_cached < stage.num_held:
            self.num_lost += 1
            return self._result([], [], refusal=KV_LOST)
        scored: list[float] = []
        if stage.score_from is not None:
            labels = enumerate(stage.token_ids[stage.score_from + 1 :], start=stage.score_from)
            scored = [logprob(request.keys[index], token_id) for index, token_id in labels]
        tokens, logprobs = self._decode(request)
        result = self._result(tokens, logprobs, scored=scored, is_last=request.has_ended)
        return self._told(request, result)

    @staticmethod
    def _told(request: _Request, result: StageResult) -> StageResult:
        """Add the experts of all tokens but the last one, as SGLang does when a request ends."""
        start = request.stage.routes_from
        if start is None or not result.is_last:
            return result
        keys = np.array(request.keys[start : len(request.row) - 1], np.uint64)
        return replace(result, routes=experts(keys).reshape(-1))

    def _result(
        self,
        tokens: list[int],
        logprobs: list[float],
        *,
        scored: Sequence[float] = (),
        is_last: bool = True,
        refusal: str = "",
    ) -> StageResult:
        return StageResult(
            token_ids=tokens,
            logprobs=logprobs,
            weight_versions=[self.version] * len(tokens),
            scored=list(scored),
            scored_version=self.version,
            num_cached=0,
            is_last=is_last,
            refusal=refusal,
        )

    def _begin(self, request: _Request) -> int:
        """Compute the known tokens; return how many of them were found."""
        stage, cache = request.stage, self._cache.setdefault(request.stage.namespace, {})
        row, most = tuple(stage.token_ids), len(stage.token_ids) - 1
        if stage.score_from is not None:
            most = min(most, stage.score_from)
        num_cached = 0
        while num_cached < most and row[: num_cached + 1] in cache:
            num_cached += 1
        if num_cached >= stage.num_held:
            request.has_begun, request.row = True, list(row)
            request.keys = [cache[row[: index + 1]] for index in range(num_cached)]
            self._compute(request)
        return num_cached

    def _compute(self, request: _Request) -> None:
        """Compute every token that has no key yet; each reads all before it."""
        stage = request.stage
        cache = self._cache.setdefault(stage.namespace, {})
        for index in range(len(request.keys), len(request.row)):
            read = np.array(request.keys, np.uint64)
            key = key_of(request.row[index], index + stage.offset, self.version, read)
            request.keys.append(key)
            cache.setdefault(tuple(request.row[: index + 1]), key)

    def _decode(self, request: _Request) -> tuple[list[int], list[float]]:
        """Sample a piece of tokens, the first of a stage alone."""
        draw, start = request.stage.draw, len(request.row)
        logprobs: list[float] = []
        num_wanted = self._rng.randint(1, request.interval) if request.num_sampled else 1
        while len(logprobs) < num_wanted and not request.has_ended:
            self._compute(request)
            index, key = request.num_sampled, request.keys[-1]
            token_id = sample(key, draw.key, draw.first_index + index)
            if index < len(draw.taught) and draw.taught[index] != UNTAUGHT:
                token_id = draw.taught[index]
            request.row.append(token_id)
            logprobs.append(logprob(key, token_id))
        return request.row[start:], logprobs

    def _join(self, stage: Stage) -> None:
        """Put joined branches together, as far as all of them are there."""
        if not stage.join or tuple(stage.token_ids[: stage.num_held]) in self._cache.get(
            stage.namespace, {}
        ):
            return
        cache, ids = self._cache.setdefault(stage.namespace, {}), stage.token_ids
        trunk, bounds = stage.join[0], [*accumulate(stage.join)]
        rows = [(*ids[:trunk], *ids[start:stop]) for start, stop in pairwise(bounds)]
        if not all(row[:n] in cache for row in rows for n in range(1, len(row) + 1)):
            return
        linear = [cache[tuple(ids[:n])] for n in range(1, trunk + 1)]
        for row in rows:
            linear += [cache[row[:n]] for n in range(trunk + 1, len(row) + 1)]
        for index, key in enumerate(linear):
            cache.setdefault(tuple(ids[: index + 1]), key)

    # Leases

    def _release(self, stage: Stage) -> None:
        for name in stage.releases:
            self._leases.pop(name, None)
            self._ended.add(name)

    def _end(self, request: _Request, answer: StageResult) -> None:
        """Lease what an orderly stage has left."""
        stage = request.stage
        if answer.refusal or not stage.keeps or stage.trajectory in self._ended:
            return
        leases = self._leases.setdefault(stage.trajectory, [])
        if stage.join:
            leases.clear()
        leases.append((stage.namespace, tuple(request.row[: len(request.keys)])))


class SymbolicRanks:
    """A link to nobody: data-parallel ranks, each with a cache of its own.

    Args:
        loss_rate: as for :class:`SymbolicSglang`.
    """

    def __init__(self, rng: random.Random, loss_rate: float, dp_size: int) -> None:
        self._rng = rng
        self._ranks = [SymbolicSglang(rng, loss_rate) for _ in range(dp_size)]
        self._rank_of: dict[int, int] = {}
        self.num_answered = [0] * dp_size
        """By rank."""

    def ask(self, number: int, stage: Stage, interval: int, rank: int | None) -> None:
        assert (rank is None) == (len(self._ranks) == 1)
        self._rank_of[number] = rank or 0
        self._ranks[rank or 0].ask(number, stage, interval)

    def abort(self, number: int) -> None:
        self._ranks[self._rank_of[number]].abort(number)

    @property
    def is_idle(self) -> bool:
        return all(rank.is_idle for rank in self._ranks)

    @property
    def num_leases(self) -> int:
        return sum(rank.num_leases for rank in self._ranks)

    @property
    def num_lost(self) -> int:
        return sum(rank.num_lost for rank in self._ranks)

    def step(self) -> tuple[int, StageResult]:
        """Return the next piece of some stage's answer, and its number."""
        busy = [index for index, rank in enumerate(self._ranks) if not rank.is_idle]
        index = busy[0] if len(busy) == 1 else self._rng.choice(busy)
        self.num_answered[index] += 1
        return self._ranks[index].step()

    def forget_leases(self) -> None:
        """Lose even what is leased."""
        for rank in self._ranks:
            rank.forget_leases()


def expected(flow: Flow, version: int = 0) -> Trajectory:
    """Return what ``flow`` must become: rounds as they are written down in ``engine.flow.flow``,
    every number computed from the whole text.
    """
    while flow.finish is None:
        flow.begin_round(version)
        if flow.finish is not None:
            break
        for stream in flow.decoding:
            key = _keys(flow, version)[id(stream.segment)][-1]
            token_id = sample(key, stream.key, stream.index)
            if flow.teacher is not None:
                taught = flow.teacher(stream.segment.block, stream.segment.branch, stream.index)
                token_id = token_id if taught is None else taught
            flow.accept(stream, token_id, logprob(key, token_id), version)
            if flow.finish is not None:
                break
    return scored(flow.trajectory(), version)


def routed(trajectory: Trajectory, version: int = 0) -> RouteArray:
    """Return [T, M, K] what computed each token of the record, were all of them computed."""
    keys = _row_keys(trajectory.token_ids, trajectory.position_ids, trajectory, version)
    return experts(np.array(keys, np.uint64))[:, 1:]


def scored(trajectory: Trajectory, version: int = 0) -> Trajectory:
    """Return the record with the log-prob of every token, computed from the whole text."""
    keys = _row_keys(trajectory.token_ids, trajectory.position_ids, trajectory, version)
    sources = predecessors(trajectory.block, trajectory.branch)
    sources[: trajectory.prompt_length] = -1
    logprobs = np.zeros(len(keys), np.float32)
    for index in np.flatnonzero(sources >= 0):
        logprobs[index] = logprob(keys[sources[index]], int(trajectory.token_ids[index]))
    return replace(trajectory, logprobs=logprobs)


def _keys(flow: Flow, version: int) -> dict[int, list[np.uint64]]:
    """Return the keys of a flow's tokens, by segment."""
    linear = SimpleNamespace(**linearise(flow.segments))
    keys = _row_keys(linear.token_ids, linear.position_ids, linear, version)
    bounds = [0, *accumulate(len(segment.token_ids) for segment in flow.segments)]
    return {
        id(segment): keys[start:stop]
        for segment, (start, stop) in zip(flow.segments, pairwise(bounds), strict=True)
    }


def _row_keys(
    token_ids: IntArray, position_ids: IntArray, labels: Labels, version: int
) -> list[np.uint64]:
    segment = np.zeros((1, len(token_ids)), np.int32)
    mask = dense_mask(segment, labels.block[None], labels.branch[None])[0]
    keys = np.zeros(len(token_ids), np.uint64)
    for index, (token_id, position) in enumerate(
        zip(token_ids.tolist(), position_ids.tolist(), strict=True)
    ):
        read = np.flatnonzero(mask[index])
        keys[index] = key_of(token_id, position, version, keys[read[read != index]])
    return list(keys)


class Labels(Protocol):
    """What has a block and a branch per token."""

    block: IntArray
    branch: IntArray
