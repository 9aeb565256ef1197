"""Growing answers are drawn from their events: branches side by side, the latest part of each."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from npr_megatron.engine.events import (
    FinishEvent,
    ForkEvent,
    JoinEvent,
    RestartEvent,
    TokenEvent,
)
from npr_megatron.engine.flow.ledger import Usage
from npr_megatron.records.trajectory import Trajectory
from npr_megatron.report.answer_view import AnswerView
from npr_megatron.report.live_tree import GrowingAnswer, live_tree
from npr_megatron.report.outline import outline
from tests.unit.report.runs import good, sums_tokenizer


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    return good(sums_tokenizer(tmp_path_factory.mktemp("live")))


def told(trajectory: Trajectory, pieces, request_id="r"):
    """Return the events of a trajectory of one block, branches taking turns, with their texts."""
    block, branch = trajectory.block.tolist(), trajectory.branch.tolist()
    streams = {place: [] for place in dict.fromkeys(zip(block, branch, strict=True))}
    trunks = []
    for index in range(trajectory.prompt_length, len(pieces)):
        place = (block[index], branch[index])
        event = TokenEvent(
            request_id,
            *place,
            len(streams[place]),
            int(trajectory.token_ids[index]),
            int(trajectory.position_ids[index]),
            False,
            -0.1,
            1,
        )
        streams[place].append((event, pieces[index]))
        if place == (0, 0):
            trunks.append((index, event, pieces[index]))
    first_branch = block.index(1)
    events = [(event, text) for index, event, text in trunks if index < first_branch]
    events.append((ForkEvent(request_id, 1, 3), ""))
    branches = [streams[1, branch] for branch in (1, 2, 3)]
    for turn in range(max(map(len, branches))):
        events += [branch[turn] for branch in branches if turn < len(branch)]
    events.append((JoinEvent(request_id, 1), ""))
    events += [(event, text) for index, event, text in trunks if index > first_branch]
    num_tokens = trajectory.num_tokens
    usage = Usage(num_tokens, trajectory.critical_path_tokens, len(pieces) - 1)
    return [*events, (FinishEvent(request_id, trajectory, usage), "")]


def printed(renderable, width=120):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()


def test_a_growing_answer_ends_as_the_outline_of_its_trajectory(answered):
    trajectory, pieces = answered
    answer = GrowingAnswer("r")
    for event, text in told(trajectory, [*pieces[:-1], ""]):
        answer.take(event, text)
    assert answer.is_finished
    assert answer.boxes() == outline(trajectory, pieces)[1:]
    assert answer.num_tokens == trajectory.num_tokens
    assert f"longest path {trajectory.critical_path_tokens} " in answer.lengths()


def test_at_every_moment_all_branches_are_shown_with_their_tokens(answered):
    answer = GrowingAnswer("problem 7")
    is_forked = False
    for event, text in told(*answered):
        answer.take(event, text)
        is_forked |= isinstance(event, ForkEvent)
        picture = printed(live_tree([answer], "1 growing", max_answers=1))
        if answer.is_finished:
            assert picture == "1 growing\n"
            continue
        assert "problem 7" in picture
        assert f"{answer.num_tokens} tokens" in picture
        if isinstance(event, TokenEvent) and event.branch:
            assert "3 branches at once" in picture
            grown = [box for box in answer.boxes()[-1].children]
            for number, branch in enumerate(grown, start=1):
                assert f"branch {number} {branch.num_tokens}t" in picture
    assert is_forked


def test_only_the_end_of_long_texts_and_the_last_parts_are_shown():
    answer = GrowingAnswer("r")
    position = 0
    for part in range(5):
        for text in ("<takeaway>", f"part{part} " + "x" * 300 + f" end{part}", "</takeaway>"):
            answer.take(TokenEvent("r", 0, 0, 0, 1, position, False, 0.0, 1), text)
            position += 1
    picture = printed(live_tree([answer], "", max_answers=1), width=1000)
    assert "... earlier parts: 2" in picture
    assert "end1" not in picture
    assert "end4" in picture
    assert "part4" not in picture


def test_answers_beyond_the_height_are_counted():
    answers = [GrowingAnswer(f"answer {number}") for number in range(5)]
    picture = printed(live_tree(answers, "", max_answers=2))
    assert "answer 1" in picture
    assert "answer 2" not in picture
    assert "and 3 more at the same time" in picture


def test_a_restart_forgets_what_was_told(answered):
    answer = GrowingAnswer("r")
    for event, text in told(*answered)[:-1]:
        answer.take(event, text)
    answer.take(RestartEvent("r", 4))
    assert answer.boxes() == ()
    assert answer.num_tokens == 0
    assert "weight version 4" in printed(live_tree([answer], "", max_answers=1))


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def watched(answered, *, is_terminal: bool, keeps_trees: bool) -> str:
    trajectory, pieces = answered
    file, clock = io.StringIO(), Clock()
    console = Console(width=120, height=40, file=file, force_terminal=is_terminal)
    with AnswerView(console, 2, keeps_trees=keeps_trees, clock=clock) as view:
        view.activity("reading the model")
        for request_id in ("a#0", "b#0"):
            for event, text in told(trajectory, pieces, request_id):
                clock.now += 0.2
                view.take(event, text)
            view.show(trajectory, pieces)
    return file.getvalue()


def test_in_a_terminal_frames_show_the_growing_branches(answered):
    text = watched(answered, is_terminal=True, keeps_trees=True)
    for part in ("reading the model", "0 of 2 answered, 1 growing", "tokens/s", "branches at once"):
        assert part in text
    assert "2 of 2 answered in" in text
    assert "2 stop" in text


@pytest.mark.parametrize("keeps_trees", [True, False])
def test_elsewhere_answers_or_a_few_lines_of_progress_are_printed(answered, keeps_trees):
    text = watched(answered, is_terminal=False, keeps_trees=keeps_trees)
    lines = text.splitlines()
    assert "\x1b" not in text
    assert ("guideline" in text) == keeps_trees
    assert lines[-1].startswith("2 of 2 answered in ")
    progress = [line for line in lines if "growing" in line]
    num_seconds = 0.2 * 2 * len(told(*answered))
    assert len(progress) == (0 if keeps_trees else num_seconds // 5)
    if progress:
        assert "1 of 2 answered" in progress[-1]
        assert "left" in progress[-1]
