"""The outline shows every response token once, in whole and in broken answers."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from npr_megatron.errors import InputError
from npr_megatron.records.trajectory import DecodeMode, FinishReason
from npr_megatron.report.outline import BoxKind, outline
from npr_megatron.report.tree import MAX_CHARACTERS, trajectory_tree
from tests.unit.report.runs import broken, good, sums_tokenizer, trajectory_of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return sums_tokenizer(tmp_path_factory.mktemp("outline"))


def drawn(trajectory, pieces):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(trajectory_tree(trajectory, pieces))
    console.file.close()
    return console.export_text()


def test_a_good_answer_has_prompt_guideline_fork_takeaway_and_answer(tokenizer):
    boxes = outline(*good(tokenizer))
    assert [box.kind for box in boxes] == [
        BoxKind.PROMPT,
        BoxKind.GUIDELINE,
        BoxKind.FORK,
        BoxKind.TAKEAWAY,
        BoxKind.TEXT,
    ]
    _, guideline, fork, takeaway, answer = boxes
    assert [plan.text for plan in guideline.children] == ["1:a", "2:b", "3:c"]
    assert [b.text for b in fork.children] == ["1:1+2=3+9=12", "2:3+5=8+4=12", "3:7+7=14+2=16"]
    assert takeaway.text == "12,12,16"
    assert answer.text == "\\boxed{12,12,16}"
    assert all(box.is_closed for box in boxes)


def test_branches_start_at_one_position_and_carry_their_own_length(tokenizer):
    trajectory, pieces = good(tokenizer)
    fork = outline(trajectory, pieces)[2]
    assert len({branch.first_position for branch in fork.children}) == 1
    for index, branch in enumerate(fork.children, start=1):
        own = trajectory.position_ids[trajectory.branch == index]
        # the newline after </step> belongs to the branch, but lies outside the box
        assert own.size - 1 <= branch.num_tokens <= own.size
        assert branch.first_position == own[0]


@pytest.mark.parametrize("make", [good, broken])
def test_boxes_hold_all_tokens_but_blank_ones_between(tokenizer, make):
    trajectory, pieces = make(tokenizer)
    held = sum(box.num_tokens for box in outline(trajectory, pieces))
    blank = sum(not piece.strip() for piece in pieces)
    assert len(pieces) - blank <= held <= len(pieces)


def test_what_was_never_closed_is_marked(tokenizer):
    boxes = outline(*broken(tokenizer))
    fork, takeaway = boxes[2], boxes[3]
    assert [branch.is_closed for branch in fork.children] == [True, False]
    assert fork.children[1].text == "2:3,8,12"
    assert not takeaway.is_closed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no tags at all",
        "</step></plan>x",
        "<plan>1:a</plan><step>1:b",
        "<guideline>stray<plan>1:a<plan>2:b</guideline>\\boxed{1}",
        "<step>a<guideline>b</step>c<takeaway>",
        "<takeaway>a<takeaway>b</takeaway></takeaway>",
    ],
)
def test_any_token_soup_can_be_drawn_without_losing_text(tokenizer, text):
    trajectory, pieces = trajectory_of(
        tokenizer,
        tokenizer.encode(text),
        mode=DecodeMode.SEQUENTIAL,
        finish=FinishReason.MALFORMED,
        finish_detail="some rule",
    )
    boxes = outline(trajectory, pieces)
    texts = "".join(_texts(boxes[1:]))
    letters = [piece for piece in pieces[trajectory.prompt_length :] if len(piece) == 1]
    assert sorted(texts.replace("\n", "")) == sorted(
        "".join([*letters, *(p for p in pieces if p == "\\boxed{"), *_stray(text)]).replace(
            "\n", ""
        )
    )
    assert "ended by malformed: some rule" in drawn(trajectory, pieces)


def _texts(boxes):
    for box in boxes:
        yield box.text
        yield from _texts(box.children)


def _stray(text):
    return {
        "</step></plan>x": ["</step>", "</plan>"],
        "<step>a<guideline>b</step>c<takeaway>": ["</step>"],
        "<takeaway>a<takeaway>b</takeaway></takeaway>": ["</takeaway>"],
    }.get(text, [])


def test_the_tree_names_lengths_and_puts_branches_on_one_line(tokenizer):
    text = drawn(*good(tokenizer))
    assert "94 tokens, longest path 62 (1.5x shorter)" in text
    (line,) = [line for line in text.splitlines() if "1+2=3+9=12" in line]
    assert "2:3+5=8+4=12" in line
    assert "3:7+7=14+2=16" in line


def test_markup_in_an_answer_is_shown_not_obeyed(tokenizer):
    trajectory, pieces = trajectory_of(
        tokenizer, tokenizer.encode("abc"), mode=DecodeMode.SEQUENTIAL
    )
    pieces[-2] = "[bold]"
    assert "[bold]" in drawn(trajectory, pieces)


def test_long_texts_are_cut_in_the_terminal_and_say_so(tokenizer):
    ids = tokenizer.encode("a" * (MAX_CHARACTERS + 41) + "b")
    trajectory, pieces = trajectory_of(tokenizer, ids, mode=DecodeMode.SEQUENTIAL)
    assert "... (41 more characters)" in drawn(trajectory, pieces).replace("\n", " ")


def test_pieces_of_another_trajectory_are_refused(tokenizer):
    trajectory, pieces = good(tokenizer)
    with pytest.raises(InputError, match="decode every token once"):
        outline(trajectory, pieces[:-1])


def test_an_empty_response_has_a_prompt_only(tokenizer):
    trajectory, pieces = trajectory_of(
        tokenizer, [], mode=DecodeMode.SEQUENTIAL, finish=FinishReason.ABORTED
    )
    assert [box.kind for box in outline(trajectory, pieces)] == [BoxKind.PROMPT]
    assert np.array_equal(trajectory.response_ids, [])
    assert "0 tokens" in drawn(trajectory, pieces)
