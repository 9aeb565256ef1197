"""The scheduler under pressure: nothing leaks, nothing stands still, and no schedule is visible in
what is decoded.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from npr_megatron.config.engine import EngineConfig
from npr_megatron.engine.schedule.scheduler import Scheduler
from npr_megatron.engine.schedule.tree import Tree
from npr_megatron.records.request import RefusalPolicy
from npr_megatron.records.trajectory import DecodeMode
from tests.engines import request_for, teacher_of
from tests.structures import SMALL, random_structure
from tests.unit.engine.symbolic import World

INSTRUCTION = (20, 21, 22, 23, 24, 25)
"""What most prompts begin with."""


def add_some(world: World, rng: random.Random, number: int, num_slots: int) -> None:
    """A random request: a tree or a text, whose budget ends it anywhere, or not at all."""
    prompt = (*INSTRUCTION[: rng.choice([0, 4, 6])], *rng.choices((30, 31), k=rng.randint(1, 3)))
    structure = random_structure(rng, prompt, SMALL, num_blocks=(1, 3), max_tokens=4)
    length = len(structure.response_ids)
    most = num_slots - len(prompt)
    budget = rng.choice([most, rng.randint(1, most), min(most, rng.randint(1, length + 2))])
    request = request_for(
        prompt,
        rollout=number,
        seed=number,
        mode=rng.choice([DecodeMode.PARALLEL, DecodeMode.PARALLEL, DecodeMode.SEQUENTIAL]),
        max_new_tokens=budget,
        max_critical_path=rng.choice([400, rng.randint(1, length + 2)]),
        on_refusal=rng.choice(list(RefusalPolicy)),
    )
    is_tree = request.mode is DecodeMode.PARALLEL
    teacher = teacher_of(structure.token_ids, len(prompt), SMALL) if is_tree else None
    world.add(request, teacher)


def world_of(**options: Any) -> World:
    return World(EngineConfig(**options))


def random_world(rng: random.Random, scheduler_type: type[Scheduler]) -> World:
    config = EngineConfig(
        num_kv_slots=rng.choice([40, 70, 120, 400]),
        max_running=rng.choice([1, 3, 16]),
        max_streams=rng.choice([5, 7, 64]),
        max_step_tokens=rng.choice([1, 40, 2048]),
    )
    return World(config, scheduler_type)


@pytest.mark.parametrize("seed", range(60))
def test_random_arrivals_aborts_suspensions_and_pushes(seed: int) -> None:
    """The partition, the rows of every tree and prompt, and progress are checked at each step; in
    the end every token is compared with one pass over its text (not where old keys are kept).
    """
    run_at_random(seed)


def run_at_random(seed: int, scheduler_type: type[Scheduler] = Scheduler) -> None:
    rng = random.Random(seed)
    world = random_world(rng, scheduler_type)
    push = rng.choice([world.start_again, world.renew, world.keep])
    for number in range(120):
        if number < 60 and rng.random() < 0.5:
            add_some(world, rng, number, world.config.num_kv_slots)
        if world.trees and rng.random() < 0.05:
            world.abort(rng.choice(sorted(world.trees)))
        if world.trees and rng.random() < 0.15:
            world.preempt(rng.choice(sorted(world.trees)))
        if rng.random() < 0.03:
            push()
        if rng.random() < 0.02:
            world.scheduler.distrust_prompts()
        world.step()
    world.drain()
    assert len(world.finished) > 10
    if push != world.keep:
        for flow in world.finished.values():
            world.check_keys(flow)


def texts(world: World) -> dict[str, tuple[list[int], str]]:
    """What every request wrote, and how it ended."""
    return {
        request_id: (flow.trajectory().token_ids.tolist(), str(flow.finish))
        for request_id, flow in world.finished.items()
    }


@pytest.mark.parametrize("seed", range(12))
def test_no_schedule_is_visible_in_what_is_decoded(seed: int) -> None:
    """Words follow from what their stream reads, so one wrong slot changes the text."""
    decoded = []
    for options in (
        {"num_kv_slots": 5000, "max_running": 64},
        {"num_kv_slots": 5000, "max_running": 1},
        {"num_kv_slots": 5000, "max_running": 64, "max_streams": 5, "max_step_tokens": 1},
        {"num_kv_slots": 90, "max_running": 64, "max_streams": 7},
        {"num_kv_slots": 90, "max_running": 8, "max_step_tokens": 40},
    ):
        rng, world = random.Random(seed), world_of(**options)
        for number in range(20):
            add_some(world, rng, number, num_slots=90)
        chooser = random.Random(seed)
        while world.trees:
            if chooser.random() < 0.1:
                world.preempt(chooser.choice(sorted(world.trees)))
            world.step()
        decoded.append(texts(world))
    assert all(other == decoded[0] for other in decoded[1:])
    assert len(decoded[0]) == 20


@pytest.mark.parametrize("policy", list(RefusalPolicy))
def test_a_request_that_just_fits_ends_at_every_budget(policy: RefusalPolicy) -> None:
    """Forced tokens beyond the budget are never placed: nobody waits for their slots."""
    prompt = (20, 21, 22)
    structure = random_structure(random.Random(3), prompt, SMALL, num_blocks=(2, 2))
    teacher = teacher_of(structure.token_ids, len(prompt), SMALL)
    length = len(structure.response_ids)
    for budget in range(1, length + 3):
        world = world_of(num_kv_slots=len(prompt) + budget)
        for rollout in range(2):
            world.add(
                request_for(
                    prompt, rollout=rollout, max_new_tokens=budget, on_refusal=policy, seed=rollout
                ),
                teacher,
            )
        world.drain()
        for flow in world.finished.values():
            assert flow.ledger.total <= budget
            world.check_keys(flow)


def test_prompts_that_begin_alike_are_computed_once() -> None:
    """Eight questions behind one instruction, four rollouts each, all at once and cold."""
    world = world_of(num_kv_slots=4000)
    instruction = tuple(range(20, 36))
    for question in range(8):
        for rollout in range(4):
            prompt = (*instruction, 20 + question, 36)
            world.add(
                request_for(
                    prompt,
                    prompt_id=str(question),
                    rollout=rollout,
                    seed=rollout,
                    mode=DecodeMode.SEQUENTIAL,
                    max_new_tokens=3,
                )
            )
    world.step()
    assert world.pool.num_slots - world.pool.num_free == len(instruction) + 8 + 32
    world.drain()
    for flow in world.finished.values():
        world.check_keys(flow)


def test_after_a_push_older_requests_still_go_first() -> None:
    world = world_of(num_kv_slots=200, max_running=2)
    for rollout in range(4):
        mode = DecodeMode.SEQUENTIAL
        world.add(request_for((20, 21), rollout=rollout, max_new_tokens=50, mode=mode))
    world.step()
    world.preempt("p#0")
    world.start_again()
    world.check()
    assert [tree.flow.request.rollout for tree in world.scheduler.waiting] == [0, 1, 2, 3]
    world.drain()


def test_a_small_pool_is_used_and_little_is_computed_twice() -> None:
    """Reserving whole budgets would use a fifth of the pool: few trajectories need theirs."""
    rng, world = random.Random(0), world_of(num_kv_slots=1500, max_running=64)
    lengths = [min(300, max(2, int(rng.lognormvariate(3.6, 0.8)))) for _ in range(160)]
    for rollout, length in enumerate(lengths):
        world.add(
            request_for(
                (20, 21),
                rollout=rollout,
                mode=DecodeMode.SEQUENTIAL,
                max_new_tokens=300,
                seed=rollout,
            ),
            lambda block, branch, index, length=length: SMALL.eos if index == length - 1 else None,
        )
    used = 0
    while world.trees:
        world.step()
        used += world.pool.num_slots - world.pool.num_free
    assert used / world.num_steps > 0.4 * world.pool.num_slots
    assert world.scheduler.counts.num_replayed_tokens < 0.05 * sum(lengths)


class LosesTheReplay(Scheduler):
    def _open(self, tree: Tree) -> None:
        super()._open(tree)
        tree.replay, tree.is_filling = None, False


class SharesWhatIsNotComputed(Scheduler):
    def _open(self, tree: Tree) -> None:
        super()._open(tree)
        assert tree.prefix is not None
        tree.prefix.num_ready = len(tree.prefix.token_ids)


class KeepsPromptsOfOldWeights(Scheduler):
    def start_again(self, version: int) -> None:
        self.prefixes.enter = lambda version: None  # type: ignore[method-assign]
        super().start_again(version)


class ForgetsARow(Scheduler):
    def _close(self, tree: Tree) -> None:
        self._pool.open_row(tree.flow.trunk.row, tree.capacity, length=0)
        super()._close(tree)


class SuspendsTheOldest(Scheduler):
    def preempt(self, tree: Tree) -> None:
        super().preempt(self.running[0])


@pytest.mark.parametrize(
    "defect",
    [
        LosesTheReplay,
        SharesWhatIsNotComputed,
        KeepsPromptsOfOldWeights,
        ForgetsARow,
        SuspendsTheOldest,
    ],
)
def test_a_planted_defect_is_found(defect: type[Scheduler]) -> None:
    with pytest.raises((AssertionError, KeyError, ValueError)):
        for seed in range(60):
            run_at_random(seed, defect)
