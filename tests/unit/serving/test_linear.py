"""Text in linear order: branches wait for their turn, stops cut exactly. Against plain oracles."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.config.engine import EngineConfig
from npr_megatron.data.sums_tokenizer import build_sums_tokenizer
from npr_megatron.data.tokenizer import load_tokenizer
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.events import (
    Event,
    FinishEvent,
    ForkEvent,
    JoinEvent,
    RestartEvent,
    TokenEvent,
)
from npr_megatron.pipeline.local_engine import open_engine
from npr_megatron.records.request import RefusalPolicy
from npr_megatron.records.trajectory import FinishReason
from npr_megatron.serving.choices import PlainChoice, WatchedChoice, whole
from npr_megatron.serving.errors import ApiError
from npr_megatron.serving.linear import LinearOrder, Piece, StopFilter
from tests.engines import request_for
from tests.speaker import write_speaker
from tests.structures import QUICK


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums")
    build_sums_tokenizer(folder)
    return load_tokenizer(folder)


def token(sums, text: str, block: int = 0, branch: int = 0, position: int = 0) -> TokenEvent:
    (token_id,) = sums.encode(text)
    return TokenEvent("r", block, branch, 0, token_id, position, False, -0.5, 1)


def said(order: LinearOrder, *events) -> str:
    return "".join(piece.text for event in events for piece in order.take(event))


def test_branches_wait_until_the_ones_before_them_have_ended(sums):
    order = LinearOrder(sums)
    assert said(order, token(sums, "a"), ForkEvent("r", 1, 3)) == "a"
    assert said(order, token(sums, "d", 1, 2), token(sums, "e", 1, 3)) == ""
    assert said(order, token(sums, "f", 1, 1)) == "f"
    assert said(order, token(sums, "</step>", 1, 2), token(sums, "\n", 1, 2)) == ""
    assert said(order, token(sums, "</step>", 1, 1)) == "</step>"
    # The newline ends branch 1: the second, ended too, is let through whole, the third lives.
    assert said(order, token(sums, "\n", 1, 1)) == "\nd</step>\ne"
    assert said(order, token(sums, "g", 1, 3)) == "g"
    assert said(order, token(sums, "</step>", 1, 3), token(sums, "\n", 1, 3)) == "</step>\n"
    assert said(order, JoinEvent("r", 1), token(sums, "b")) == "b"


def test_a_block_that_is_cut_short_is_shown_in_order_at_the_end(sums):
    order = LinearOrder(sums)
    order.take(ForkEvent("r", 1, 2))
    assert said(order, token(sums, "d", 1, 2), token(sums, "e", 1, 1)) == "e"
    assert "".join(piece.text for piece in order.rest()) == "d"
    assert order.rest() == []


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Tokenizer, and answers of a model that branches: events per step, and trajectories."""
    folder = write_speaker(tmp_path_factory.mktemp("speaker") / "hf")
    tokenizer = load_tokenizer(folder)
    engine = open_engine(folder, EngineConfig(max_streams=5), tokenizer.vocabulary)
    assert isinstance(engine, EmbeddedEngine)
    prompt = tokenizer.encode("a?\n")
    answers = []
    for seed in range(30):
        steps: list[list[Event]] = []
        events: list[Event] = []
        request = request_for(
            prompt, seed=seed, max_new_tokens=60 + seed, on_refusal=RefusalPolicy.SEQUENTIAL
        )
        engine.add(request, listener=events.append)
        while engine.num_unfinished:
            ended = engine.step()
            steps.append(list(events))
            events.clear()
        answers.append((steps, ended[0]))
    return tokenizer, answers


def shown_of(choice, steps, trajectory) -> str:
    shown = [x for step in steps for x in choice.take(step)]
    shown += choice.finish(trajectory)
    return "".join(x.text for x in shown)


def test_every_stream_joins_to_the_decoded_answer(told):
    tokenizer, answers = told
    for steps, trajectory in answers:
        ids = [i for i in trajectory.response_ids.tolist() if i != tokenizer.vocabulary.eos]
        expected = tokenizer.decode(ids)
        choice = PlainChoice(tokenizer, trajectory.prompt_length, [])
        assert shown_of(choice, steps, trajectory) == expected
        complete, ending = whole(trajectory, tokenizer)
        assert complete.text == expected
        assert choice.ending == ending
        assert ending.completion_tokens == trajectory.num_tokens
    assert {t.finish for _, t in answers} == {"stop", "length"}
    assert max(int(t.branch.max()) for _, t in answers) == 3


@given(st.data())
@QUICK
def test_a_stop_cuts_where_it_first_stands(told, data):
    tokenizer, answers = told
    steps, trajectory = data.draw(st.sampled_from(answers))
    text = whole(trajectory, tokenizer)[0].text
    start = data.draw(st.integers(0, len(text) - 1))
    inside = text[start : start + data.draw(st.integers(1, 12))]
    others = data.draw(
        st.lists(st.text(st.sampled_from(sorted(set(text))), min_size=1), max_size=3)
    )
    choice = PlainChoice(tokenizer, trajectory.prompt_length, [inside, *others])
    # Step after step, what ends first ends the answer; among stops that end in one token it is the
    # one that begins first.
    grown, cut = "", None
    for piece in whole(trajectory, tokenizer)[0].pieces:
        grown += piece.text
        if places := [p for stop in (inside, *others) if (p := grown.find(stop)) >= 0]:
            cut = min(places)
            break
    assert shown_of(choice, steps, trajectory) == text[:cut]
    assert choice.ending is not None and choice.ending.reason == "stop_text"


@given(
    st.lists(st.text("ab<", max_size=4), max_size=12), st.sampled_from(["ab", "aab", "<a<b", "b"])
)
@QUICK
def test_the_filter_holds_back_no_more_than_a_beginning(texts, stop):
    cut = StopFilter([stop])
    seen = ""
    for text in texts:
        pieces = cut.cut([Piece(text, 0, 0.0, 0)])
        seen += "".join(piece.text for piece in pieces)
        if cut.is_found:
            break
    whole_text = "".join(texts)
    if stop in whole_text:
        assert cut.is_found and seen == whole_text[: whole_text.index(stop)]
    else:
        held = whole_text[len(seen) :]
        assert seen == whole_text[: len(seen)] and stop.startswith(held) and held != stop
        assert seen + cut.rest() == whole_text


def test_what_was_shown_cannot_begin_anew(sums):
    choice = PlainChoice(sums, 0, [])
    choice.take([ForkEvent("r", 1, 2), token(sums, "x", 1, 2)])  # held back
    assert choice.take([RestartEvent("r", 2), token(sums, "a")])[0].text == "a"
    with pytest.raises(ApiError) as told:
        choice.take([RestartEvent("r", 3)])
    assert told.value.code == "answer_restarted"


def test_half_a_character_is_void_when_all_begins_anew(of_bytes):
    first, second, third = of_bytes.encode("\u2200")
    letter = of_bytes.encode("a")[0]

    def heard(*ids: int) -> list[Event]:
        return [TokenEvent("r", 0, 0, 0, i, 0, False, 0.0, 1) for i in ids]

    events = [*heard(first), RestartEvent("r", 2), *heard(first, second, third, letter)]
    assert WatchedChoice(of_bytes).take(events)[-1].text == "\u2200a"


def test_watchers_see_longer_chunks_when_they_read_slowly(told):
    tokenizer, answers = told
    steps, trajectory = max(answers, key=lambda answer: answer[1].num_blocks)
    events = [event for step in steps for event in step if not isinstance(event, FinishEvent)]
    slow = WatchedChoice(tokenizer).take(events)
    kinds = [x.tag and x.tag["event"] for x in slow]
    assert kinds.count("fork") == kinds.count("join") == trajectory.num_blocks > 1
    branches = sum(e.num_branches for e in events if isinstance(e, ForkEvent))
    assert kinds.count("token") == branches + trajectory.num_blocks + 1
    fast = [x for step in steps for x in WatchedChoice(tokenizer).take(step)]
    assert len(fast) > 3 * len(slow)


def test_aborted_answers_are_no_answers(told):
    tokenizer, answers = told
    for reason, code in (
        (FinishReason.ABORTED, "shutting_down"),
        (FinishReason.FAILED, "model_failed"),
    ):
        cut = dataclasses.replace(answers[0][1], finish=reason)
        with pytest.raises(ApiError) as refusal:
            whole(cut, tokenizer)
        assert refusal.value.code == code
