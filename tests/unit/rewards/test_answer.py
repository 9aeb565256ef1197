"""Boxes and answers, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_megatron.rewards.answer import BOX_WINDOW_CHARS, answers_match, boxed_answer


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}<eos>", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{}", ""),
        ("no box", None),
        (r"\boxed{never closed", None),
        ("", None),
    ],
)
def test_the_last_balanced_box_is_taken(text, found):
    assert boxed_answer(text) == found


def test_a_box_outside_the_window_is_not_seen():
    box = r"\boxed{42}"
    assert boxed_answer(box + "x" * (BOX_WINDOW_CHARS - len(box))) == "42"
    assert boxed_answer(box + "x" * (BOX_WINDOW_CHARS - len(box) + 1)) is None


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("17,11,13", "17,11,13"),
        (" 17, 11,\n13 ", "17,11,13"),
        ("$17,\\; 11$", "17,11"),
        ("1,234", "1234"),
        ("12,345,678", "12345678"),
        ("0.50", "1/2"),
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac12", "1/2"),
        (r"-\tfrac{3}{4}", "-0.75"),
        ("2/4", "1/2"),
        ("+5", "5"),
        ("5.", "5"),
        (r"\frac{\pi}{2}", r"\pi/2"),
        (r"1 \frac{1}{2}", r"1\frac{1}{2}"),
        ("007", "7"),
        (r"\text{Monday}", "Monday"),
        (r"\left(1, 2\right)", "(1,2)"),
        ("1/2, 0.25", r"\frac{2}{4}, \frac14"),
        ("2x+2", "2x + 2"),
    ],
)
def test_equal_answers_match_however_they_are_dressed(found, expected):
    assert answers_match(found, expected)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("17,11", "17,11,13"),
        ("11,17", "17,11"),
        ("1711", "17,11"),
        ("1,234", "1,2,34"),
        ("1234", "1,234"),
        ("12,34", "1234"),
        ("0.333", "1/3"),
        ("1/0", "1"),
        ("", "0"),
        ("", ""),
        ("Monday", "monday"),
        ("2x+2", "2(x+1)"),
        ("3,,4", "3,4"),
        ("1e3", "1000"),
        (r"1\frac{1}{2}", "11/2"),
        (r"\frac{a+b}{c}", "a+b/c"),
    ],
)
def test_different_answers_do_not_match(found, expected):
    assert not answers_match(found, expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-999, 9999), min_size=1, max_size=5), st.data())
def test_a_list_matches_itself_and_no_list_with_another_item(numbers, data):
    answer = ",".join(map(str, numbers))
    assert answers_match(", ".join(map(str, numbers)), answer)
    place = data.draw(st.integers(0, len(numbers) - 1))
    wrong = [*numbers]
    wrong[place] += data.draw(st.integers(1, 50))
    assert not answers_match(",".join(map(str, wrong)), answer)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_can_be_compared_and_order_does_not_matter_for_scalars(left, right):
    if "," not in left + right:
        assert answers_match(left, right) == answers_match(right, left)
