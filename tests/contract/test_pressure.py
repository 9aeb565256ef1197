"""Random schedules on a pool that is too small for what is asked of it.

Each seed adds trees, texts and duplicates of them in waves, and in between aborts some, preempts
some, lets some run out of time, pushes weights and refuses broken ones, and scores what has ended.
SGLang itself retracts requests every few steps here (``SGLANG_TEST_RETRACT``) and evicts what it
can. Whatever happens, a trajectory is what an undisturbed engine writes, cut where it was ended, or
has for each token the log-prob of its version; nothing stands still and nothing is left behind.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from npr_megatron.config.engine import EngineConfig
from npr_megatron.engine.backends import create_engine
from npr_megatron.engine.flow.flow import Teacher
from npr_megatron.engine.interface import Engine
from npr_megatron.errors import DivergenceError
from npr_megatron.records.request import GenerationRequest, RefusalPolicy
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from tests.contract.backends import MODEL, ROUNDING, Backend
from tests.engines import assert_nothing_is_left, request_for, teacher_of
from tests.listeners import Replay
from tests.policy import learnt_weights, prompt_of
from tests.structures import SMALL, random_structure
from tests.trees import assert_is_a_tree

NUM_SEEDS, SEEDS_PER_TEST = 30, 15
"""Of each policy; an engine meets twice as many."""
NUM_REQUESTS = 7
MOST_TOKENS = 70
MOST_ABORTED = 2
NUM_SLOTS = 420
"""Two or three of the largest trajectories fit at once, joins included."""
WITHIN_S = 120.0
"""Of one seed, on a machine that does other things too."""
PROMPTS = [prompt_of(random.Random(number)) for number in range(3)]
PROMPTS += [(*PROMPTS[0], 30, 2, 31)]
OUTSIDE = (FinishReason.ABORTED, FinishReason.TIMEOUT)
"""Ends that somebody else decided."""


@functools.cache
def weights_of(version: int) -> dict[str, Tensor]:
    """The learnt policy, moved a little by every version."""
    generator = torch.Generator().manual_seed(version)
    return {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in learnt_weights(MODEL, SMALL).items()
    }


def small(kind: str, kv_after_push: str) -> Backend:
    config = EngineConfig.model_validate(
        {
            "backend": kind,
            "num_kv_slots": NUM_SLOTS,
            "max_running": 6,
            "max_streams": 12,
            "max_step_tokens": 64,
            "kv_after_push": kv_after_push,
            "debug_checks": True,
        }
    )
    return Backend(name=f"{kind}, {kv_after_push}", config=config, vocabulary=SMALL)


BACKENDS = [
    small("embedded", "drop"),
    small("embedded", "recompute"),
    small("sglang", "drop"),
    small("sglang", "recompute"),
]


@pytest.fixture(scope="module", params=BACKENDS, ids=lambda backend: backend.name)
def pressed(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Backend]]:
    backend: Backend = request.param
    if backend.absence:
        pytest.skip(backend.absence)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SGLANG_TEST_RETRACT", "1")
        environment.setenv("SGLANG_TEST_RETRACT_INTERVAL", "7")
        engine = create_engine(MODEL, backend.config, backend.vocabulary, "cpu")
    yield engine, backend
    engine.close()


@dataclass(eq=False)
class Case:
    """One random schedule, and what came of it."""

    seed: int
    engine: Engine
    backend: Backend
    rng: random.Random = field(init=False)
    asked: dict[str, tuple[GenerationRequest, Teacher | None]] = field(default_factory=dict)
    replays: dict[str, Replay] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    finished: dict[str, Trajectory] = field(default_factory=dict)
    deadline: float = 0.0

    def run(self) -> None:
        """Let things happen until all has been asked and answered."""
        self.rng = random.Random(self.seed)
        self.deadline = time.monotonic() + WITHIN_S
        self.backend.load(self.engine, weights_of(0), 0)
        while len(self.asked) < NUM_REQUESTS or self.engine.num_unfinished:
            for event, chance in EVENTS.items():
                if self.rng.random() < chance:
                    event(self)
            self.step()
        assert_nothing_is_left(self.engine)

    def step(self) -> None:
        open_ids = sorted(self.engine.unfinished)
        assert time.monotonic() < self.deadline, f"{open_ids} stand still"
        for trajectory in self.engine.step():
            name = f"p#{trajectory.rollout}"
            assert name not in self.finished, f"{name} came back twice"
            self.finished[name] = trajectory
        assert self.asked.keys() == self.finished.keys() | set(self.engine.unfinished)

    def add(self) -> None:
        for _ in range(min(self.rng.randint(1, 4), NUM_REQUESTS - len(self.asked))):
            request, teacher = self.random_request(len(self.asked))
            replay = Replay(request.request_id) if self.rng.random() < 0.3 else None
            self.engine.add(request, teacher, replay.take if replay is not None else None)
            self.asked[request.request_id] = (request, teacher)
            if replay is not None:
                self.replays[request.request_id] = replay

    def random_request(self, number: int) -> tuple[GenerationRequest, Teacher | None]:
        """A new one, or one like an earlier one but for its name."""
        rng = self.rng
        if self.asked and rng.random() < 0.25:
            known, teacher = self.asked[rng.choice(sorted(self.asked))]
            return dataclasses.replace(known, rollout=number), teacher
        prompt = rng.choice(PROMPTS)
        request = request_for(
            prompt,
            rollout=number,
            seed=rng.getrandbits(64),
            mode=rng.choices(list(DecodeMode), [1, 4])[0],
            max_new_tokens=rng.choice([MOST_TOKENS, rng.randint(1, MOST_TOKENS)]),
            max_critical_path=rng.choice([MOST_TOKENS, rng.randint(1, 40)]),
            on_refusal=rng.choice(list(RefusalPolicy)),
            timeout_s=rng.choice([None, None, None, rng.uniform(0.001, 1.0)]),
            top_p=rng.choice([1.0, 0.95]),
        )
        if request.mode is DecodeMode.SEQUENTIAL or rng.random() < 0.4:
            return request, None
        one, other = (
            random_structure(rng, prompt, SMALL, num_blocks=(1, 3), max_tokens=4) for _ in range(2)
        )
        first, second = (teacher_of(s.token_ids, len(prompt), SMALL) for s in (one, other))
        turn = rng.choice([5, 12, MOST_TOKENS, MOST_TOKENS])  # into another response: often broken
        return request, lambda *place: (second if place[2] >= turn else first)(*place)

    def abort(self) -> None:
        if self.engine.unfinished and len(self.aborted) < MOST_ABORTED:
            name = self.rng.choice(sorted(self.engine.unfinished))
            self.engine.abort(name)
            self.aborted.add(name)

    def preempt(self) -> None:
        if self.engine.unfinished:
            self.engine.preempt(self.rng.choice(sorted(self.engine.unfinished)))

    def push(self) -> None:
        version = self.engine.weight_version + 1
        if version < 4:
            self.backend.stage(self.engine, weights_of(version))
            self.engine.commit(version)

    def push_what_is_broken(self) -> None:
        weights = dict(weights_of(1))
        weights["norm.weight"] = torch.full_like(weights["norm.weight"], float("nan"))
        self.backend.stage(self.engine, weights)
        with pytest.raises(DivergenceError, match=r"norm\.weight"):
            self.engine.commit(self.engine.weight_version + 1)

    def score(self) -> None:
        """Score something that has ended while others run."""
        live = self.engine.weight_version
        mine = [t for t in self.finished.values() if set(t.weight_versions.tolist()) == {-1, live}]
        if mine:
            trajectory = self.rng.choice(mine)
            (scored,) = self.engine.score([trajectory])
            np.testing.assert_allclose(scored, trajectory.logprobs, atol=ROUNDING, rtol=0)


EVENTS = {
    Case.add: 0.4,
    Case.abort: 0.04,
    Case.preempt: 0.15,
    Case.push: 0.06,
    Case.push_what_is_broken: 0.03,
    Case.score: 0.05,
}


def assert_came_back_properly(case: Case) -> None:
    """Hold every trajectory against its request, its listener and what was done to it."""
    for name, trajectory in case.finished.items():
        request, finish = case.asked[name][0], trajectory.finish
        assert_is_a_tree(trajectory, SMALL)
        prompt_ids = trajectory.token_ids[: trajectory.prompt_length].tolist()
        assert tuple(prompt_ids) == request.prompt_ids
        assert trajectory.num_tokens <= request.max_new_tokens
        assert trajectory.critical_path_tokens <= request.max_critical_path
        assert finish is not FinishReason.FAILED
        assert finish is not FinishReason.ABORTED or name in case.aborted
        assert finish is not FinishReason.TIMEOUT or request.timeout_s is not None
        if name in case.replays:
            case.replays[name].assert_rebuilds(trajectory)
        if case.backend.config.kv_after_push == "drop":
            assert len(set(trajectory.weight_versions.tolist()) - {-1}) <= 1


def assert_logprobs_are_of_their_versions(cases: list[Case]) -> None:
    """By one masked pass of the embedded engine per version."""
    trajectories = [t for case in cases for t in case.finished.values()]
    for version in range(4):
        mine = [t for t in trajectories if version in t.weight_versions]
        expected = cases[0].backend.oracle(weights_of(version), version).score(mine)
        for trajectory, logprobs in zip(mine, expected, strict=True):
            own = trajectory.weight_versions == version
            np.testing.assert_allclose(
                trajectory.logprobs[own], logprobs[own], atol=ROUNDING, rtol=0
            )


def num_compared_with_undisturbed(case: Case) -> int:
    """Hold those of one version against an undisturbed engine: all of it, or its beginning."""
    num_compared = 0
    for name, trajectory in case.finished.items():
        versions = set(trajectory.weight_versions.tolist()) - {-1}
        if len(versions) != 1:
            continue
        (version,) = versions
        request, teacher = case.asked[name]
        undisturbed = dataclasses.replace(request, timeout_s=None)
        (whole,) = case.backend.expected([(undisturbed, teacher)], weights_of(version), version)
        is_cut = trajectory.finish in OUTSIDE
        if not is_cut:
            assert (trajectory.finish, trajectory.finish_detail) == (
                whole.finish,
                whole.finish_detail,
            )
        assert_begins(trajectory, whole, is_whole=not is_cut)
        num_compared += 1
    return num_compared


def assert_begins(trajectory: Trajectory, whole: Trajectory, *, is_whole: bool) -> None:
    """Every stream of ``trajectory`` is that of ``whole``, or the beginning of it."""
    for label in {*zip(trajectory.block.tolist(), trajectory.branch.tolist(), strict=True)}:
        mine, full = (
            t.token_ids[(t.block == label[0]) & (t.branch == label[1])].tolist()
            for t in (trajectory, whole)
        )
        assert mine == full[: len(mine)]
    if is_whole:
        np.testing.assert_array_equal(trajectory.token_ids, whole.token_ids)
        np.testing.assert_array_equal(trajectory.forced, whole.forced)


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, SEEDS_PER_TEST))
def test_every_trajectory_is_exact_or_ended_for_a_reason(
    pressed: tuple[Engine, Backend], first: int
) -> None:
    engine, backend = pressed
    cases, num_compared = list[Case](), 0
    for seed in range(first, first + SEEDS_PER_TEST):
        case = Case(seed, engine, backend)
        try:
            case.run()
            assert_came_back_properly(case)
            num_compared += num_compared_with_undisturbed(case)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        cases.append(case)
    assert_logprobs_are_of_their_versions(cases)
    ends = Counter(t.finish for case in cases for t in case.finished.values())
    assert ends.keys() >= {FinishReason.STOP, FinishReason.LENGTH, *OUTSIDE}, ends
    assert num_compared > 2 * SEEDS_PER_TEST
    assert engine.stats().num_preemptions > SEEDS_PER_TEST / 2
    assert sum(t.branch.max() > 1 for c in cases for t in c.finished.values()) > SEEDS_PER_TEST / 2
