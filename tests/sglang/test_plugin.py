"""Stages inside SGLang: forks and joins to the letter of the reference, leases, refusals."""

from __future__ import annotations

import dataclasses
import random

from npr_megatron.engine.sglang.stage import KV_LOST
from tests.sglang.stages import NUM_SLOTS, go_on, new_trails, open_block, tell_apart

TOLERANCE = 1e-5


def test_chained_blocks_are_those_of_the_reference(server, reference):
    rng = random.Random(1)
    trails = new_trails(6, rng, "chained")
    for _ in range(3):
        go_on(server, trails, rng)
        open_block(server, trails, rng)
    go_on(server, trails, rng)
    num_wrong, worst = tell_apart(reference, trails)
    assert sum(len(trail.greedy) for trail in trails) > 700
    assert num_wrong == 0
    assert worst < TOLERANCE


def test_a_join_computes_nothing_that_was_computed_before(server):
    rng = random.Random(2)
    trails = new_trails(2, rng, "held")
    go_on(server, trails, rng)
    open_block(server, trails, rng)
    answers = server.run([trail.stage([21], score_from=trail.num_held) for trail in trails])
    assert [answer.num_cached for answer in answers] == [trail.num_held for trail in trails]


def test_without_offsets_or_joins_the_reference_is_missed(server, reference):
    for namespace, changes in {
        "flat": {"offset": 0},
        "textual": {"join": (), "num_held": 0},
    }.items():
        rng = random.Random(3)
        trails = new_trails(2, rng, namespace)
        go_on(server, trails, rng)
        open_block(server, trails, rng)
        starts = [len(trail.token_ids) for trail in trails]
        for trail in trails:
            trail.greedy, trail.told = [], []
        stages = [
            dataclasses.replace(
                trail.stage(max_new_tokens=30, score_from=trail.num_held), **changes
            )
            for trail in trails
        ]
        for trail, start, answer in zip(trails, starts, server.run(stages), strict=True):
            trail.note(answer, range(start - 1, start + 29))
            trail.extend(answer.token_ids)
        num_wrong, worst = tell_apart(reference, trails)
        assert num_wrong > 0, namespace
        assert worst > 1e-2, namespace


def test_lost_branches_are_refused_and_leave_nothing_behind(server):
    rng = random.Random(4)
    trails = new_trails(2, rng, "lost")
    go_on(server, trails, rng)
    open_block(server, trails, rng)
    server.flush()
    stages = [trail.stage(score_from=trail.num_held, max_new_tokens=5) for trail in trails]
    for _ in range(2):
        answers = server.run(stages)
        assert [answer.refusal for answer in answers] == [KV_LOST] * 2
        assert [answer.token_ids for answer in answers] == [[], []]
    probes = [dataclasses.replace(s, num_held=0, join=(), offset=0) for s in stages]
    assert [answer.num_cached for answer in server.run(probes)] == [0, 0]


def test_leases_outlive_pressure_until_they_are_released(server):
    rng = random.Random(5)
    trails = new_trails(3, rng, "leased")
    go_on(server, trails, rng)
    open_block(server, trails, rng)
    server.occupy(2 * NUM_SLOTS, seed=1)
    joins = [trail.stage(score_from=trail.num_held) for trail in trails]
    assert [answer.refusal for answer in server.run(joins)] == [""] * 3
    names = tuple(trail.name for trail in trails)
    server.run([dataclasses.replace(joins[0], trajectory="other", releases=names)])
    server.occupy(2 * NUM_SLOTS, seed=2)
    assert [answer.refusal for answer in server.run(joins)] == [KV_LOST] * 3
