"""Stages inside SGLang: forks and joins to the letter of the reference, leases, refusals."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from npr_megatron.engine.sglang.stage import KV_LOST, UNTAUGHT, Budget, Draw, Stage
from npr_megatron.records.randomness import branch_key
from npr_megatron.records.trajectory import DecodeMode
from tests.engines import UNTIED, request_for, run_one, tiny_engine
from tests.sglang.stages import (
    NUM_SLOTS,
    POISON,
    answer_of,
    go_on,
    new_trails,
    open_block,
    sampling_params,
    tell_apart,
)
from tests.structures import NUM_IDS, SMALL, WORDS

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
    (probe,) = server.run([dataclasses.replace(stages[0], num_held=0, join=(), offset=0)])
    assert probe.num_cached == 0


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


def test_a_flush_ends_all_leases(server):
    trails = new_trails(4, random.Random(6), "flushed")
    go_on(server, trails, random.Random(6))
    server.flush()
    # What was held is no lock of the new tree: giving it back would be an error of SGLang's.
    released = trails[0].stage(trajectory="other", releases=tuple(trail.name for trail in trails))
    assert [answer.num_cached for answer in server.run([released])] == [0]
    server.occupy(2 * NUM_SLOTS, seed=3)
    assert [answer.num_cached for answer in server.run([released])] == [0]


def test_trajectories_of_equal_text_share_what_is_joined(server, reference):
    first, second, probe = (new_trails(1, random.Random(7), "twins")[0] for _ in range(3))
    second.name = "twins/second"
    for trail in (first, second):
        rng = random.Random(7)
        go_on(server, [trail], rng)
        open_block(server, [trail], rng)
    assert first.token_ids == second.token_ids
    rng = random.Random(8)
    stages = [trail.stage(score_from=trail.num_held, keeps=True) for trail in (first, second)]
    assert [answer.refusal for answer in server.run(stages)] == ["", ""]
    server.run([probe.stage(trajectory="other", namespace="other", releases=(first.name,))])
    server.occupy(2 * NUM_SLOTS, seed=4)
    go_on(server, [second], rng)
    assert tell_apart(reference, [second]) == (0, pytest.approx(0.0, abs=TOLERANCE))


def test_a_seal_leaves_every_known_token_in_the_cache(server):
    (trail,) = new_trails(1, random.Random(9), "sealed")
    server.run([trail.stage(keeps=True)])
    length = len(trail.token_ids)
    (answer,) = server.run([trail.stage([20, 21])])
    assert answer.num_cached == length


def test_branches_stop_soon_after_their_budget(server):
    (trail,) = new_trails(1, random.Random(10), "budget")
    stages = [
        trail.stage(
            [20 + branch],
            max_new_tokens=200,
            draw=Draw(key=branch),
            budget=Budget(name="budget/1", branch=branch, num_tokens=42),
        )
        for branch in range(1, 5)
    ]
    lengths = [len(answer.token_ids) for answer in server.run(stages)]
    assert sum(lengths) >= 42
    assert max(lengths) <= 42 // 4 + 6, "a batch in flight and the pieces of a prefill"


def test_taught_tokens_are_taken_and_scored(server, reference):
    (trail,) = new_trails(1, random.Random(11), "taught")
    length, lesson = len(trail.token_ids), (30, UNTAUGHT, 2, 7)
    draw = Draw(temperature=0.0, taught=lesson)
    (answer,) = server.run([trail.stage(max_new_tokens=6, draw=draw, stop_ids=(7,))])
    assert [answer.token_ids[index] for index in (0, 2, 3)] == [30, 2, 7]
    assert len(answer.token_ids) == 4, "a taught token ends a stage like a sampled one"
    places = range(length - 1, length + 3)
    trail.told = list(zip(places, answer.token_ids, answer.logprobs, strict=True))
    trail.greedy = [(length, answer.token_ids[1])]
    trail.extend(answer.token_ids)
    assert tell_apart(reference, [trail]) == (0, pytest.approx(0.0, abs=TOLERANCE))


@pytest.mark.parametrize(
    "shape", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6, "min_p": 0.1}], ids=str
)
def test_samples_are_those_of_the_embedded_engine(server, weights, shape):
    engine = tiny_engine(model=UNTIED, weights=weights)
    rows = [tuple(random.Random(seed).choices(WORDS, k=12)) for seed in range(4)]
    wanted = []
    for seed, row in enumerate(rows):
        request = request_for(
            row, rollout=seed, mode=DecodeMode.SEQUENTIAL, max_new_tokens=40, seed=seed, **shape
        )
        wanted.append(run_one(engine, request))
    stages = [
        Stage(
            trajectory=f"sampled/{seed}",
            namespace=f"sampled {shape}",
            token_ids=[*row],
            offset=0,
            max_new_tokens=40,
            stop_ids=(SMALL.eos,),
            draw=Draw(key=branch_key(seed, 0, 0), **shape),
        )
        for seed, row in enumerate(rows)
    ]
    for answer, one in zip(server.run(stages), wanted, strict=True):
        assert answer.token_ids == one.token_ids[12:].tolist()
        assert answer.logprobs == pytest.approx(one.logprobs[12:].tolist(), abs=TOLERANCE)


def test_ordinary_requests_are_served_beside_stages(server, reference):
    (trail,) = new_trails(1, random.Random(12), "beside")
    prompt = trail.token_ids
    stage = trail.stage(max_new_tokens=24, draw=Draw(key=3))
    alone = server.run([stage])[0]
    found = server.engine.generate(
        input_ids=[prompt, stage.token_ids, prompt],
        sampling_params=[
            {"max_new_tokens": 24, "temperature": 0},
            sampling_params(stage),
            {"max_new_tokens": 24, "temperature": 0.8, "top_p": 0.7, "top_k": 9},
        ],
        return_logprob=True,
        top_logprobs_num=[2, 0, 0],
        cache_salt=["plain", stage.namespace, "plain"],
    )
    assert found[1]["output_ids"] == alone.token_ids
    assert answer_of(found[1]).logprobs == pytest.approx(alone.logprobs, abs=TOLERANCE)
    assert len(found[2]["output_ids"]) == 24
    greedy = answer_of(found[0])
    trail.note(greedy, range(len(prompt) - 1, len(prompt) + 23))
    trail.extend(greedy.token_ids)
    assert tell_apart(reference, [trail]) == (0, pytest.approx(0.0, abs=TOLERANCE))
    best = [row[0][1] for row in found[0]["meta_info"]["output_top_logprobs"]]
    assert best == greedy.token_ids


def test_what_is_not_a_number_is_said_and_harms_nobody(server):
    sound, broken = new_trails(2, random.Random(13), "poison")
    alone = server.run([sound.stage(max_new_tokens=8)])[0]
    broken.extend([POISON])
    stages = [sound.stage(max_new_tokens=8), broken.stage(max_new_tokens=8, score_from=0)]
    beside, failed = server.run(stages)
    assert beside.token_ids == alone.token_ids
    assert all(math.isfinite(logprob) for logprob in beside.logprobs)
    assert all(math.isnan(logprob) for logprob in failed.logprobs)
    assert len(failed.logprobs) == 8
    assert all(0 <= token < NUM_IDS for token in failed.token_ids)


def test_streams_that_gave_way_to_others_go_on_as_if_they_had_not(server, reference):
    rng = random.Random(14)
    trails = new_trails(8, rng, "retracted")
    go_on(server, trails, rng)
    open_block(server, trails, rng)
    stages = [
        trail.stage(max_new_tokens=220, draw=Draw(key=number), score_from=trail.num_held)
        for number, trail in enumerate(trails)
    ]
    answers = server.run(stages)
    late = [index for index, answer in enumerate(answers) if answer.num_retractions]
    assert late
    (alone,) = server.run([stages[late[0]]])
    assert alone.token_ids == answers[late[0]].token_ids
    for trail, answer in zip(trails, answers, strict=True):
        first = len(trail.token_ids) - 1
        trail.greedy, trail.told = [], []
        trail.note(answer, range(first, first + 220))
        trail.greedy = []
        trail.extend(answer.token_ids)
    assert tell_apart(reference, trails)[1] < TOLERANCE
