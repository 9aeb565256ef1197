"""Flows driven by stages become what they become round by round, whatever happens to the stages."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from npr_megatron.config.engine import EngineConfig, SglangConfig
from npr_megatron.engine.events import Event
from npr_megatron.engine.flow.flow import Flow, Teacher
from npr_megatron.engine.sglang.client.conductor import Conductor
from npr_megatron.engine.sglang.client.jobs import Era, FlowJob, ScoreJob
from npr_megatron.engine.sglang.client.reservations import slots_of, usable_slots
from npr_megatron.engine.sglang.client.stops import Stops
from npr_megatron.engine.sglang.client.thread import News
from npr_megatron.records.request import GenerationRequest, RefusalPolicy
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from npr_megatron.schema.grammar import Grammar
from npr_megatron.schema.render import BlockTexts
from tests.engines import request_for, skeleton_of, teacher_of
from tests.listeners import STREAMS, Replay
from tests.structures import SMALL, Structure, random_structure
from tests.unit.engine.symbolic_sglang import ROUTED, SymbolicRanks, expected, routed, scored

GRAMMAR = Grammar(SMALL)
NUM_SEEDS = 30
MOST_ANSWERS = 20_000


class Stand:
    """A conductor over symbolic SGLang, without threads."""

    def __init__(
        self, seed: int, *, loss_rate: float = 0.0, num_kv_slots: int = 4096, dp_size: int = 1
    ) -> None:
        self.config = EngineConfig(
            num_kv_slots=num_kv_slots, max_running=8, sglang=SglangConfig(dp_size=dp_size)
        )
        self.sglang = SymbolicRanks(random.Random(seed), loss_rate, dp_size)
        self.conductor = Conductor(self.config, usable_slots(self.config), self.sglang)
        self.era = Era(0)
        self.jobs: dict[int, FlowJob] = {}
        self.ended: dict[int, Trajectory] = {}

    def add(
        self,
        request: GenerationRequest,
        teacher: Teacher | None,
        listener: Callable[[Event], None] | None = None,
    ) -> None:
        job = FlowJob(
            Flow(request, GRAMMAR, SMALL.eos, teacher),
            self.conductor,
            Stops.of(GRAMMAR),
            self.era,
            age=request.rollout,
            num_slots=slots_of(request, self.config),
            post=self.hear,
            listener=listener,
            routed=ROUTED,
        )
        self.jobs[request.rollout] = job
        self.conductor.enter(job)

    def hear(self, news: News) -> None:
        for event in news.events:
            assert news.listener is not None
            news.listener(event)
        if news.trajectory is not None:
            assert news.trajectory.rollout not in self.ended, "a trajectory ended twice"
            self.ended[news.trajectory.rollout] = news.trajectory

    def answer(self) -> None:
        """Let SGLang say one thing."""
        self.conductor.take(*self.sglang.step())
        self.conductor.check_integrity()

    def drain(self) -> None:
        for _ in range(MOST_ANSWERS):
            if self.sglang.is_idle:
                break
            self.answer()
        assert len(self.ended) == len(self.jobs), "nothing is under way and not all have ended"
        assert self.sglang.num_leases == 0, "leases outlive their trajectories"

    @property
    def unfinished(self) -> list[FlowJob]:
        return [job for job in self.jobs.values() if not job.is_done]


def broken(seed: int, teacher: Teacher, rate: float) -> Teacher:
    """A teacher that here and there dictates a tag or the end; a function of the place alone, since
    stages ask ahead of time and in another order than rounds.
    """

    def teach(block: int, branch: int, index: int) -> int | None:
        rng = random.Random(f"{seed}/{block}/{branch}/{index}")
        if rng.random() < rate:
            return rng.choice([*SMALL.tags, SMALL.eos])
        return teacher(block, branch, index)

    return teach


def task(rng: random.Random, rollout: int) -> tuple[GenerationRequest, Teacher]:
    """A request and what leads it; equal calls with equal generators give equal tasks."""
    prompt = [20, 21, 22 + rng.randrange(2)]
    structure = random_structure(
        rng, prompt, SMALL, num_blocks=(1, 3), max_branches=4, max_tokens=4
    )
    teacher = skeleton_of(structure.token_ids, structure.prompt_length, SMALL)
    error_rate = rng.choice([0.0, 0.0, 0.02])
    request = request_for(
        prompt,
        rollout=rollout,
        seed=rollout,
        mode=rng.choices(list(DecodeMode), [1, 6])[0],
        max_new_tokens=rng.choice([rng.randint(1, 90), 200]),
        max_critical_path=rng.choice([rng.randint(1, 70), 200]),
        on_refusal=rng.choice(list(RefusalPolicy)),
    )
    return request, broken(rng.getrandbits(32), teacher, error_rate)


def tasks(seed: int, count: int) -> list[tuple[GenerationRequest, Teacher]]:
    rng = random.Random(seed)
    return [task(rng, rollout) for rollout in range(count)]


def assert_as_expected(found: Trajectory, request: GenerationRequest, teacher: Teacher) -> None:
    wanted = expected(Flow(request, GRAMMAR, SMALL.eos, teacher))
    assert (found.finish, found.finish_detail) == (wanted.finish, wanted.finish_detail)
    for name in STREAMS:
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
    assert_routed(found)


def assert_routed(found: Trajectory) -> None:
    """Hold the experts against the whole text. They may be unknown where branches were open."""
    routes = found.routed_experts
    assert routes is not None
    is_known = routes[:, 0, 0] >= 0
    assert (routes[~is_known] == -1).all()
    np.testing.assert_array_equal(routes[is_known], routed(found)[is_known])
    if found.branch[-1] == 0 and found.finish is FinishReason.STOP:
        assert np.flatnonzero(~is_known).tolist() == [len(routes) - 1]


@pytest.mark.parametrize("dp_size", [1, 3])
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_stages_in_any_order_give_what_rounds_give(seed, dp_size):
    stand = Stand(seed, dp_size=dp_size)
    for request, teacher in tasks(seed, 4):
        stand.add(request, teacher)
    stand.drain()
    assert stand.sglang.num_lost == 0, "a trajectory was looked for on a rank that has not got it"
    assert all(stand.sglang.num_answered), "a rank had nothing to do"
    for request, teacher in tasks(seed, 4):
        assert_as_expected(stand.ended[request.rollout], request, teacher)


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_loss_preemption_and_little_room_change_nothing(seed):
    rng = random.Random(seed)
    stand = Stand(
        seed,
        loss_rate=rng.choice([0.0, 0.02]),
        num_kv_slots=rng.choice([480, 900]),
        dp_size=rng.choice([1, 2]),
    )
    replays: dict[int, Replay] = {}
    for request, teacher in tasks(seed, 4):
        replay = replays[request.rollout] = Replay(request.request_id)
        stand.add(request, teacher, replay.take if rng.random() < 0.5 else None)
    while stand.unfinished:
        if rng.random() < 0.02:
            stand.conductor.preempt(rng.choice(stand.unfinished))
        stand.answer()
    stand.drain()
    for request, teacher in tasks(seed, 4):
        found, replay = stand.ended[request.rollout], replays[request.rollout]
        assert_as_expected(found, request, teacher)
        if replay.trajectory is not None:
            replay.assert_rebuilds(found)


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_what_is_aborted_anywhere_is_a_whole_record(seed):
    rng = random.Random(seed)
    stand = Stand(seed)
    for request, teacher in tasks(seed, 3):
        stand.add(request, teacher)
    for _ in range(rng.randrange(60)):
        if not stand.sglang.is_idle:
            stand.answer()
    for job in stand.unfinished:
        job.end(FinishReason.ABORTED)
        stand.conductor.settle(job)
    stand.drain()
    for trajectory in stand.ended.values():
        np.testing.assert_array_equal(trajectory.logprobs, scored(trajectory).logprobs)


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_scores_are_those_of_the_record(seed):
    stand = Stand(seed, loss_rate=0.01)
    for request, teacher in tasks(seed, 3):
        stand.add(request, teacher)
    stand.drain()
    jobs = {
        index: ScoreJob(trajectory, stand.conductor, stand.config, age=100 + index)
        for index, trajectory in stand.ended.items()
    }
    for job in jobs.values():
        stand.conductor.enter(job)
    stand.drain()
    for index, trajectory in stand.ended.items():
        np.testing.assert_array_equal(jobs[index].logprobs, scored(trajectory).logprobs)


@pytest.mark.parametrize("wrong", [SMALL.eos, SMALL.plan_open, SMALL.step_close])
@pytest.mark.parametrize("seed", range(5))
def test_branches_that_break_a_rule_are_closed_and_their_end_is_scored(seed, wrong):
    """Served branches that break a rule in their text, or by closing right behind their header."""
    blocks = (BlockTexts(((25,), (26,), (27,)), ((28, 29), (30, 31, 32), (33,)), (34,)),)
    structure = Structure(vocabulary=SMALL, prompt_ids=(20, 21), blocks=blocks, conclusion=(35, 36))
    teacher = teacher_of(structure.token_ids, 2, SMALL)

    def teach(block: int, branch: int, index: int) -> int | None:
        is_wrong = (branch, index) in {(1, 4), (2, 3), (3, 3)}
        return wrong if is_wrong else teacher(block, branch, index)

    request = request_for((20, 21), seed=seed, on_refusal=RefusalPolicy.SEQUENTIAL)
    stand = Stand(seed)
    stand.add(request, teach)
    stand.drain()
    assert_as_expected(stand.ended[0], request, teach)
    assert "closed a step" in stand.ended[0].finish_detail
    is_end = stand.ended[0].token_ids == SMALL.step_close
    assert stand.ended[0].forced[is_end].any()


def test_text_that_went_on_plainly_is_no_prefix_for_those_that_forked_there():
    """The plain one has no room to fork, and writes what the other one joins."""
    texts = ((25,), (26,), (27,), (28,))
    blocks = (BlockTexts(texts, texts, (34,)),)
    structure = Structure(vocabulary=SMALL, prompt_ids=(20, 21), blocks=blocks, conclusion=(35,))
    response = structure.response_ids
    forked = request_for((20, 21), rollout=1)
    to_fork = response.index(SMALL.guideline_close) + 1
    plain = request_for(
        (20, 21),
        max_new_tokens=to_fork + 24,  # a fork of four takes 25
        on_refusal=RefusalPolicy.SEQUENTIAL,
    )
    stand = Stand(0)
    stand.add(plain, lambda block, branch, index: response[index])
    stand.drain()
    assert stand.ended[0].finish_detail.endswith("no room to fork")
    assert list(stand.ended[0].response_ids) == response[: to_fork + 24]
    teacher = teacher_of(structure.token_ids, 2, SMALL)
    stand.add(forked, teacher)
    stand.drain()
    assert_as_expected(stand.ended[1], forked, teacher)


def test_losses_do_occur_in_these_tests():
    """Control: a cache that never loses anything would prove nothing."""
    num_lost = 0
    for seed in range(10):
        stand = Stand(seed, loss_rate=0.1)
        for request, teacher in tasks(seed, 4):
            stand.add(request, teacher)
        rng = random.Random(seed)
        while stand.unfinished:
            if rng.random() < 0.05:
                stand.sglang.forget_leases()
            stand.answer()
        num_lost += stand.sglang.num_lost
    assert num_lost > 10
