"""The scheduler under pressure: nothing leaks, nothing stands still, and no schedule is visible in
what is decoded.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from npr_megatron.config.engine import EngineConfig
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


def random_world(rng: random.Random) -> World:
    return world_of(
        num_kv_slots=rng.choice([40, 70, 120, 400]),
        max_running=rng.choice([1, 3, 16]),
        max_streams=rng.choice([5, 7, 64]),
        max_step_tokens=rng.choice([1, 40, 2048]),
    )


@pytest.mark.parametrize("seed", range(60))
def test_random_arrivals_aborts_suspensions_and_pushes(seed: int) -> None:
    """The partition, the rows of every tree and prompt, and progress are checked at each step; in
    the end every token is compared with one pass over its text.
    """
    rng = random.Random(seed)
    world = random_world(rng)
    push = rng.choice([world.start_again, world.renew])
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
    for flow in world.finished.values():
        world.check_keys(flow)
