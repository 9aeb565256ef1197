"""Problems from files: every fault named at once, epochs that a resumed run continues."""

from __future__ import annotations

import json

import pytest

from npr_megatron.config.run import PromptFileTask, SumsTask
from npr_megatron.data.problems import Problem, read_jsonl
from npr_megatron.data.sources import FileSource, open_source
from npr_megatron.data.sums import SumsSource
from npr_megatron.errors import InputError


def make_problems(count, name="train"):
    return [
        Problem(id=f"{name}/{i}", question=f"What is {name} {i}?", answer=str(i))
        for i in range(count)
    ]


def write(path, problems):
    lines = [json.dumps({"id": p.id, "question": p.question, "answer": p.answer}) for p in problems]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_a_written_file_reads_back(tmp_path):
    problems = make_problems(5)
    assert read_jsonl(write(tmp_path / "a.jsonl", problems)) == problems


def test_numbers_blank_lines_and_further_keys_are_fine(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 7, "question": " Two? ", "answer": 2.5, "level": 3}\n\n')
    assert read_jsonl(path) == [Problem(id="7", question="Two?", answer="2.5")]


def test_a_line_separator_inside_a_question_does_not_end_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"id": "1", "question": "one\u2028two", "answer": "3"}\r\n', "utf-8")
    assert read_jsonl(path) == [Problem(id="1", question="one\u2028two", answer="3")]


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"id": "1", "question": "größer?", "answer": "3"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.jsonl: problems must be UTF-8 text; byte 27"):
        read_jsonl(path)


def test_every_wrong_line_is_named_at_once(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(
        "\n".join(
            [
                '{"id": "1", "question": "q", "answer": "a"}',
                "not json",
                '["a", "list"]',
                '{"id": "2", "question": "q"}',
                '{"id": "3", "question": "  ", "answer": true}',
                '{"id": "1", "question": "q2", "answer": "a"}',
            ]
        )
    )
    with pytest.raises(InputError) as refusal:
        read_jsonl(path)
    message = str(refusal.value)
    assert str(path) in message
    assert "line 1:" not in message
    assert "line 2: not JSON" in message
    assert "line 3: a JSON list" in message
    assert "line 4: lacks answer" in message
    assert "line 5: empty or not text: question, answer" in message
    assert "line 6: the id '1' was used before" in message


def test_a_long_list_of_faults_is_counted_not_dumped(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("x\n" * 50)
    with pytest.raises(InputError, match=r"found 50 wrong.*line 20.*and 30 more"):
        read_jsonl(path)


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_a_missing_or_empty_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "none.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"none\.jsonl"):
        read_jsonl(path)


def test_an_epoch_asks_each_problem_once_and_the_next_in_another_order():
    source = FileSource(make_problems(12), [], seed=0)
    epochs = [
        [p.id for step in range(4) for p in source.problems_for_step("zero", 4 * epoch + step, 3)]
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(p.id for p in make_problems(12))
    assert epochs[0] != epochs[1]


def test_no_step_asks_a_problem_twice_even_when_epochs_do_not_divide():
    source = FileSource(make_problems(10), [], seed=0)
    for step in range(30):
        ids = [problem.id for problem in source.problems_for_step("zero", step, 4)]
        assert len(set(ids)) == 4


def test_a_resumed_source_gives_the_same_next_batch():
    def ask(step, stage="zero", seed=0):
        source = FileSource(make_problems(30), [], seed)
        return [p.id for p in source.problems_for_step(stage, step, 5)]

    assert ask(17) == ask(17)
    assert ask(17) != ask(17, stage="npr")
    assert ask(17) != ask(17, seed=1)


def test_steps_larger_than_the_file_are_refused():
    with pytest.raises(InputError, match=r"11 problems a step.*holds 10"):
        FileSource(make_problems(10), [], 0).problems_for_step("zero", 0, 11)
    with pytest.raises(InputError, match=r"3 held-out.*holds 2"):
        FileSource([], make_problems(2), 0).held_out(3)


def test_open_source_reads_both_files(tmp_path):
    train, test = make_problems(6), make_problems(4, "test")
    task = PromptFileTask(
        kind="jsonl",
        train_path=write(tmp_path / "train.jsonl", train),
        test_path=write(tmp_path / "test.jsonl", test),
    )
    source = open_source(task, seed=0)
    assert source.held_out(4) == test
    assert set(source.problems_for_step("zero", 0, 6)) == set(train)


def test_a_test_question_that_is_trained_on_is_refused(tmp_path):
    leaked = Problem(id="leak", question="what is  TRAIN 3?", answer="3")
    task = PromptFileTask(
        kind="jsonl",
        train_path=write(tmp_path / "train.jsonl", make_problems(6)),
        test_path=write(tmp_path / "test.jsonl", [*make_problems(2, "test"), leaked]),
    )
    with pytest.raises(InputError, match=r"1 of them .*'leak'"):
        open_source(task, seed=0)


def test_the_sums_task_opens_without_files():
    assert isinstance(open_source(SumsTask(kind="sums"), seed=0), SumsSource)
