"""What is told of a growing trajectory, replayed, is the trajectory: same streams, same order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_megatron.engine.events import Event, FinishEvent, JoinEvent, TokenEvent, Watcher
from npr_megatron.engine.flow.flow import Flow
from npr_megatron.records.trajectory import DecodeMode, FinishReason
from npr_megatron.schema.grammar import Grammar
from tests.engines import TINY, drain, random_weights, request_for, teacher_of, tiny_engine
from tests.listeners import Replay, assert_told, listen
from tests.structures import QUICK, SMALL, Structure, structures

FEW = settings(QUICK, max_examples=12)


def taught(structure: Structure, rollout: int):
    teacher = teacher_of(structure.token_ids, structure.prompt_length, structure.vocabulary)
    return request_for(structure.prompt_ids, rollout=rollout), teacher


@FEW
@given(
    several=st.lists(structures(2, 4, max_tokens=3), min_size=1, max_size=3),
    num_kv_slots=st.sampled_from([450, 4096]),
    data=st.data(),
)
def test_replaying_the_events_rebuilds_the_trajectory(several, num_kv_slots, data):
    vocabulary = several[0].vocabulary
    several = [structure for structure in several if structure.vocabulary == vocabulary]
    engine = tiny_engine(vocabulary=vocabulary, num_kv_slots=num_kv_slots)
    replays = [
        listen(engine, *taught(structure, rollout)) for rollout, structure in enumerate(several)
    ]
    finished = []
    while engine.num_unfinished:
        if data.draw(st.integers(0, 9)) == 0:
            unfinished = [r.request_id for r in replays if r.trajectory is None]
            engine.preempt(data.draw(st.sampled_from(unfinished)))
        finished += engine.step()
    assert_told(replays, finished)
    assert all(t.finish is FinishReason.STOP for t in finished)


@pytest.mark.parametrize("mode", list(DecodeMode))
@pytest.mark.parametrize("max_new_tokens", [1, 7, 30])
def test_answers_that_break_off_are_told_to_their_last_token(mode, max_new_tokens):
    engine = tiny_engine()
    request = request_for([20, 21, 22], mode=mode, max_new_tokens=max_new_tokens)
    replay = listen(engine, request)
    assert_told([replay], drain(engine))


@FEW
@given(structure=structures(2, max_tokens=3), num_steps=st.integers(0, 30))
def test_an_aborted_answer_is_told_as_far_as_it_came(structure, num_steps):
    engine = tiny_engine(vocabulary=structure.vocabulary)
    request, teacher = taught(structure, 0)
    replay = listen(engine, request, teacher)
    finished = []
    for _ in range(num_steps):
        finished += engine.step()
    if engine.num_unfinished:
        engine.abort(request.request_id)
        finished += engine.step()
    assert_told([replay], finished)


@FEW
@given(structure=structures(2, max_tokens=3), num_steps=st.integers(0, 12))
def test_a_push_that_drops_makes_what_was_told_void(structure, num_steps):
    engine = tiny_engine(vocabulary=structure.vocabulary, kv_after_push="drop")
    replay = listen(engine, *taught(structure, 0))
    finished = []
    for _ in range(num_steps):
        finished += engine.step()
    was_told = bool(replay.linear())
    is_running = replay.trajectory is None
    engine.load(random_weights(TINY, seed=1), version=1)
    finished += drain(engine)
    assert_told([replay], finished)
    assert replay.num_restarts == (was_told and is_running)
    versions = set(finished[0].weight_versions[structure.prompt_length :].tolist())
    assert versions == {1 if is_running else 0}


@pytest.mark.parametrize("kv_after_push", ["recompute", "keep"])
def test_a_push_that_goes_on_repeats_no_token(kv_after_push):
    engine = tiny_engine(kv_after_push=kv_after_push)
    replay = listen(engine, request_for([20, 21], mode=DecodeMode.SEQUENTIAL, max_new_tokens=9))
    finished = [*engine.step(), *engine.step(), *engine.step()]
    engine.load(random_weights(TINY, seed=1), version=1)
    finished += drain(engine)
    assert replay.num_restarts == 0
    assert_told([replay], finished)
    assert set(finished[0].weight_versions.tolist()) == {-1, 0, 1}


def test_tokens_are_told_in_the_step_that_makes_them():
    engine = tiny_engine()
    told: list[Event] = []
    request = request_for([20, 21], mode=DecodeMode.SEQUENTIAL, max_new_tokens=5)
    engine.add(request, listener=told.append)
    lengths = []
    while engine.num_unfinished:
        engine.step()
        lengths.append(sum(isinstance(event, TokenEvent) for event in told))
    assert lengths == list(range(1, len(lengths) + 1))


def test_a_stream_tells_of_all_its_requests_and_leaves_the_engine_free():
    engine = tiny_engine()
    requests = [request_for([20, 21], rollout=i, max_new_tokens=5 + i) for i in range(3)]
    replays = {request.request_id: Replay(request.request_id) for request in requests}
    for event in engine.stream(requests):
        replays[event.request_id].take(event)
    assert_told(list(replays.values()), tiny_engine().generate(requests))
    assert engine.num_unfinished == 0


def test_a_stream_that_is_left_early_leaves_the_engine_free():
    engine = tiny_engine()
    events = engine.stream([request_for([20], mode=DecodeMode.SEQUENTIAL)])
    assert isinstance(next(events), TokenEvent)
    events.close()
    assert engine.num_unfinished == 0
    assert len(engine.generate([request_for([20], max_new_tokens=2)])) == 1


def test_a_listener_that_hears_a_token_twice_would_notice():
    """Control: the replay of these tests is strict."""
    token = TokenEvent("p#0", 0, 0, 0, 20, 1, False, -0.1, 0)
    replay = Replay("p#0")
    replay.take(token)
    for wrong in (token, TokenEvent("p#0", 1, 1, 0, 20, 1, False, -0.1, 0), JoinEvent("p#0", 1)):
        with pytest.raises(AssertionError):
            replay.take(wrong)


def test_nothing_is_told_behind_the_end():
    flow = Flow(request_for([20, 21]), Grammar(SMALL), SMALL.eos)
    flow.finish = FinishReason.ABORTED
    watcher = Watcher()
    (end,) = watcher.news(flow, 0)
    assert isinstance(end, FinishEvent)
    assert watcher.news(flow, 0) == []
