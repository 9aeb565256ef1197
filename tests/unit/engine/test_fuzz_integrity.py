"""Five hundred engines under pressure: tiny pools, sampled and dictated forks, aborts, timeouts,
preemptions, weights that change, weights that are refused, weights and memory that break.

Every engine checks its slots after every step (``debug_checks``). Here: every request comes back
exactly once, as a tree, within its budget, for a reason that was given; nothing stands still; no
slot is left behind; and what did not fail carries the log-probs of the versions it names.
"""

from __future__ import annotations

import functools
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from npr_megatron.config.engine import EngineConfig
from npr_megatron.engine.compute.runner import LocalRunner
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.flow.flow import Teacher
from npr_megatron.engine.interface import Engine
from npr_megatron.engine.schedule.batch import Batch
from npr_megatron.errors import DivergenceError
from npr_megatron.records.request import GenerationRequest, RefusalPolicy
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from npr_megatron.schema.parse import parse
from tests.engines import TINY, assert_nothing_is_left, request_for, teacher_of, tiny_engine
from tests.policy import learnt_weights, prompt_of
from tests.structures import SMALL, random_structure
from tests.trees import assert_is_a_tree

NUM_SEEDS, SEEDS_PER_TEST = 500, 50
NUM_STEPS, MOST_REQUESTS = 40, 9
"""Per seed: steps with events, before the engine is drained; requests."""
ROUNDING = 1e-4
"""Of a hundred thousand tokens of a sharp policy some differ by 2e-5; a stale key moves some token
of its trajectory by a hundred times more."""
PROMPTS = [prompt_of(random.Random(number)) for number in range(3)]
PROMPTS += [(*PROMPTS[0], 30, 2, 31), (*PROMPTS[0], 30, 6)]


def is_broken(version: int) -> bool:
    """Whether the version is finite and gives NaN all the same."""
    return version % 6 == 5


@functools.cache
def weights_of(version: int) -> dict[str, Tensor]:
    """The learnt policy, moved a little by every version."""
    generator = torch.Generator().manual_seed(version)
    weights = {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in learnt_weights(TINY).items()
    }
    if is_broken(version):
        weights["layers.1.down_proj.weight"][:] = 1e38
    return weights


class SpoiltRunner(LocalRunner):
    """The real runner on memory that breaks: NaN in a slot just written, when asked for."""

    spoil_with: random.Random | None = None

    def run(self, batch: Batch) -> Tensor:
        logits = super().run(batch)
        if self.spoil_with is not None:
            slot = int(self.spoil_with.choice(batch.slots))
            for cache in self.model.kv_cache:
                cache[slot] = float("nan")
            self.spoil_with = None
        return logits


def random_config(rng: random.Random) -> EngineConfig:
    return EngineConfig(
        num_kv_slots=rng.randint(60, 240),
        max_running=rng.randint(1, 8),
        max_streams=rng.choice([5, 9, 64]),
        max_step_tokens=rng.choice([3, 24, 512]),
        kv_after_push=rng.choice(["drop", "recompute", "keep"]),
        debug_checks=True,
    )


@dataclass(eq=False)
class Case:
    """One engine, what was asked of it, and what came back."""

    seed: int
    rng: random.Random = field(init=False)
    config: EngineConfig = field(init=False)
    runner: SpoiltRunner = field(init=False)
    engine: Engine = field(init=False)
    now_s: float = 0.0
    requests: dict[str, GenerationRequest] = field(default_factory=dict)
    unfinished: set[str] = field(default_factory=set)
    aborted: set[str] = field(default_factory=set)
    suspects: set[str] = field(default_factory=set)
    """Those that may have read what is broken."""
    is_tainted: bool = False
    finished: list[Trajectory] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.config = random_config(self.rng)
        self.runner = SpoiltRunner(TINY, self.config)
        self.engine = EmbeddedEngine(
            TINY, self.config, SMALL, runner=self.runner, clock=lambda: self.now_s
        )
        self.engine.load(weights_of(0))

    def run(self) -> None:
        """Let things happen, then drain; every step that runs something moves the oldest tree."""
        for _ in range(NUM_STEPS):
            for event, chance in EVENTS.items():
                if self.rng.random() < chance:
                    event(self)
            self.step()
        most = 20 + 3 * sum(self.requests[name].max_new_tokens + 8 for name in self.unfinished)
        for _ in range(most):
            if not self.engine.num_unfinished:
                break
            self.step()
        assert not self.unfinished, f"{sorted(self.unfinished)} stand still"
        assert_nothing_is_left(self.engine)

    def step(self) -> None:
        self.now_s += self.rng.random()
        for trajectory in self.engine.step():
            self.unfinished.remove(f"p#{trajectory.rollout}")  # a second return is a KeyError
            self.finished.append(trajectory)
        assert self.engine.num_unfinished == len(self.unfinished)

    def add(self) -> None:
        if len(self.requests) < MOST_REQUESTS:
            rng, number = self.rng, len(self.requests)
            prompt_ids = rng.choice(PROMPTS)
            most = self.config.num_kv_slots - len(prompt_ids)
            request = request_for(
                prompt_ids,
                rollout=number,
                seed=rng.getrandbits(64),
                mode=rng.choices(list(DecodeMode), [1, 4])[0],
                max_new_tokens=rng.choice([min(most, 80), rng.randint(1, 50)]),
                max_critical_path=rng.choice([80, rng.randint(1, 40)]),
                on_refusal=rng.choice(list(RefusalPolicy)),
                timeout_s=rng.choice([None, None, None, rng.uniform(0.0, 20.0)]),
                repetition_penalty=rng.choice([1.0, 1.0, 1.05]),
                top_p=rng.choice([1.0, 0.95]),
            )
            self.engine.add(request, self.random_teacher(prompt_ids))
            self.requests[request.request_id] = request
            self.unfinished.add(request.request_id)
            if self.is_tainted:
                self.suspects.add(request.request_id)

    def random_teacher(self, prompt_ids: Sequence[int]) -> Teacher | None:
        """A whole response, or one that turns into another in the middle; often none."""
        if self.rng.random() < 0.6:
            return None
        first, second = (
            random_structure(self.rng, prompt_ids, SMALL, num_blocks=(1, 3), max_tokens=4)
            for _ in range(2)
        )
        one, other = (teacher_of(s.token_ids, s.prompt_length, SMALL) for s in (first, second))
        turn = self.rng.choice([3, 8, 10**9])
        return lambda block, branch, index: (other if index >= turn else one)(block, branch, index)

    def abort(self) -> None:
        if self.unfinished:
            name = self.rng.choice(sorted(self.unfinished))
            self.engine.abort(name)
            self.aborted.add(name)

    def preempt(self) -> None:
        if self.unfinished:
            self.engine.preempt(self.rng.choice(sorted(self.unfinished)))

    def commit(self) -> None:
        version = self.engine.weight_version + self.rng.randint(1, 3)
        for name, tensor in weights_of(version).items():
            self.engine.staging()[name].copy_(tensor)
        self.engine.commit(version)
        self.is_tainted = is_broken(version)
        if self.is_tainted:
            self.suspects |= self.unfinished

    def commit_nan(self) -> None:
        for name, tensor in weights_of(0).items():
            self.engine.staging()[name].copy_(tensor)
        self.engine.staging()["norm.weight"][3] = float("nan")
        with pytest.raises(DivergenceError, match=r"norm\.weight"):
            self.engine.commit(self.engine.weight_version + 1)

    def spoil_memory(self) -> None:
        self.runner.spoil_with = random.Random(self.rng.random())
        self.is_tainted = True
        self.suspects |= self.unfinished


EVENTS = {
    Case.add: 0.5,
    Case.abort: 0.02,
    Case.preempt: 0.12,
    Case.commit: 0.05,
    Case.commit_nan: 0.02,
    Case.spoil_memory: 0.015,
}


def assert_came_back_properly(case: Case, trajectory: Trajectory) -> None:
    """Hold one trajectory against its request and what was done to it."""
    name = f"p#{trajectory.rollout}"
    request, finish = case.requests[name], trajectory.finish
    is_parallel = request.mode is DecodeMode.PARALLEL
    is_training = request.on_refusal is RefusalPolicy.TERMINATE
    assert_is_a_tree(trajectory, SMALL)
    assert tuple(trajectory.token_ids[: trajectory.prompt_length].tolist()) == request.prompt_ids
    assert trajectory.num_tokens <= request.max_new_tokens
    assert trajectory.critical_path_tokens <= request.max_critical_path
    assert np.isfinite(trajectory.logprobs).all()
    reasons = {
        FinishReason.ABORTED: name in case.aborted,
        FinishReason.TIMEOUT: request.timeout_s is not None,
        FinishReason.FAILED: name in case.suspects,
        FinishReason.MALFORMED: is_parallel and is_training,
    }
    assert reasons.get(finish, True), f"{finish} without a reason"
    if finish is FinishReason.STOP and is_parallel and not trajectory.finish_detail:
        assert parse(trajectory.response_ids, SMALL).document is not None
    versions = trajectory.weight_versions[trajectory.prompt_length :]
    if case.config.kv_after_push == "drop":
        assert len(set(versions.tolist())) <= 1


def assert_logprobs_are_of_their_versions(cases: Sequence[Case]) -> None:
    """Score what was decoded on keys and values of the weights it names, all of it together."""
    users: dict[int, list[Trajectory]] = defaultdict(list)
    for case in cases:
        for trajectory in case.finished if case.config.kv_after_push != "keep" else []:
            for version in set(trajectory.weight_versions.tolist()) - {-1}:
                users[version].append(trajectory)
    oracle = tiny_engine(weights=weights_of(0))
    for version, trajectories in users.items():
        if is_broken(version):
            continue
        oracle.load(weights_of(version), version)
        for trajectory, expected in zip(trajectories, oracle.score(trajectories), strict=True):
            mine = trajectory.weight_versions == version
            if trajectory.finish is FinishReason.FAILED:
                mine &= trajectory.logprobs != 0.0  # forced tokens that got no distribution
            np.testing.assert_allclose(
                trajectory.logprobs[mine], expected[mine], atol=ROUNDING, rtol=0
            )


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_PER_TEST))
def test_no_slot_and_no_request_is_lost(first: int) -> None:
    cases = []
    for seed in range(first, first + SEEDS_PER_TEST):
        try:
            case = Case(seed)
            case.run()
            for trajectory in case.finished:
                assert_came_back_properly(case, trajectory)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        cases.append(case)
    assert_logprobs_are_of_their_versions(cases)
    ends = Counter(trajectory.finish for case in cases for trajectory in case.finished)
    assert set(ends) == set(FinishReason), ends
    stats = [case.engine.stats() for case in cases]
    assert sum(s.num_preemptions for s in stats) > SEEDS_PER_TEST
    assert sum(s.num_cached_prompt_tokens for s in stats) > SEEDS_PER_TEST
    assert sum(t.branch.max() > 1 for case in cases for t in case.finished) > SEEDS_PER_TEST / 2


@pytest.mark.parametrize("num_steps", [1, 4, 9, 15, 22])
def test_a_slot_that_breaks_fails_the_one_request_that_reads_it(num_steps: int) -> None:
    requests = [
        request_for((20 + number, 21, 22), rollout=number, seed=number, max_new_tokens=100)
        for number in range(6)
    ]
    config = EngineConfig(num_kv_slots=2048, debug_checks=True)
    runner = SpoiltRunner(TINY, config)
    engine = EmbeddedEngine(TINY, config, SMALL, runner=runner)
    engine.load(weights_of(0))
    quiet = engine.generate(requests)
    for request in requests:
        engine.add(request)
    finished: dict[int, Trajectory] = {}
    for number in range(500):
        if number == num_steps:
            runner.spoil_with = random.Random(num_steps)
        finished |= {trajectory.rollout: trajectory for trajectory in engine.step()}
        if not engine.num_unfinished:
            break
    failed = [t.rollout for t in finished.values() if t.finish is FinishReason.FAILED]
    assert len(failed) == 1
    for expected in quiet:
        found = finished[expected.rollout]
        if expected.rollout in failed:
            assert found.num_tokens < expected.num_tokens
            continue
        assert found.finish is expected.finish
        np.testing.assert_array_equal(found.token_ids, expected.token_ids)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=ROUNDING, rtol=0)
