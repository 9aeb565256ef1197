"""``npr generate``: prompts from everywhere, answers line by line, bad prompts by themselves."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from npr_megatron.cli.answer_file import AnswerFile
from npr_megatron.cli.generate import default_budget
from npr_megatron.cli.prompt_files import Prompt, read_prompts
from npr_megatron.config.model import InitConfig, ModelConfig
from npr_megatron.data.sums_tokenizer import SUMS_TOKENS, build_sums_tokenizer
from npr_megatron.errors import InputError
from npr_megatron.records.trajectory import Trajectory
from npr_megatron.weights.checkpoints.hf import random_init, write_hf
from tests.unit.config.test_check import write_qwen3

NUM_POSITIONS = 64


def write_model(folder: Path) -> Path:
    """Write a model that speaks the characters of the sums task, in no sensible order."""
    model = ModelConfig(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        vocab_size=len(SUMS_TOKENS),
        max_position_embeddings=NUM_POSITIONS,
        tie_word_embeddings=False,  # tied ones would say the last sign for ever
    )
    write_hf(folder, model, random_init(model, InitConfig(embedding_std=0.5), seed=3))
    build_sums_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model") / "hf"))


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def by_name(lines) -> dict[tuple[str, int], dict]:
    found = {(line["id"], line["sample"]): line for line in lines}
    assert len(found) == len(lines)
    return found


def texts(lines) -> dict[tuple[str, int], str]:
    return {name: line["text"] for name, line in by_name(lines).items()}


def test_generate_without_prompts_is_refused(npr, tmp_path):
    result = npr("generate", str(tmp_path))
    assert result.code == 2
    assert result.err == (
        "error: no prompt was given; add one in quotes, --file, or - for standard input\n"
    )


@pytest.mark.parametrize(("positions", "budget"), [(512, 256), (262144, 8192)])
def test_without_a_budget_answers_may_take_half_the_positions(tmp_path, positions, budget):
    folder = write_qwen3(tmp_path / "model", max_position_embeddings=positions)
    assert default_budget(folder) == budget


def test_generate_from_no_model_is_one_line(npr, tmp_path):
    result = npr("generate", str(tmp_path / "none"), "a=1?")
    assert result.code == 2
    assert result.err.startswith(f"error: model folder {tmp_path / 'none'} has no config.json")
    assert result.err.count("\n") == 1


def test_prompts_are_read_from_arguments_text_and_jsonl_in_order(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("a=1?\n\n b=2?\r\n")
    lines.write_text('{"question": "a=1?", "id": "x"}\n\n{"question": "b\u2028c", "answer": "2"}\n')
    assert read_prompts(["c?"], text) == [
        Prompt("prompt 1", "c?"),
        Prompt("p.txt:1", "a=1?"),
        Prompt("p.txt:3", " b=2?"),
    ]
    assert read_prompts([], lines) == [Prompt("x", "a=1?"), Prompt("p.jsonl:3", "b\u2028c")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a?\n{b}?\n", [Prompt("stdin:1", "a?"), Prompt("stdin:2", "{b}?")]),
        ('{"question": "a?"}\n', [Prompt("stdin:1", "a?")]),
    ],
)
@pytest.mark.parametrize(("arguments", "file"), [(["-"], None), ([], Path("-"))])
def test_standard_input_is_text_or_jsonl(monkeypatch, text, expected, arguments, file):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert read_prompts(arguments, file) == expected


def test_all_prompt_lines_without_a_question_are_named(tmp_path):
    path = tmp_path / "p.jsonl"
    wrong = ["a=1?", "[1]", '{"prompt": "a"}', '{"question": 3}']
    path.write_text("\n".join(['{"question": "ok"}', *wrong]))
    with pytest.raises(InputError) as error:
        read_prompts([], path)
    assert [line.split(" ")[0] for line in str(error.value).splitlines()] == [
        f"p.jsonl:{number}" for number in range(2, 6)
    ]


def test_two_prompts_of_one_name_are_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "a", "id": "x"}\n{"question": "b", "id": "x"}\n')
    with pytest.raises(InputError, match='such as "x"'):
        read_prompts([], path)


def test_json_lines_hold_text_outline_lengths_and_log_probs(npr, model):
    result = npr("generate", model, "a:1+2?", "b:3?", "--json", "--mode", "sequential")
    assert result.code == 0, result.err
    lines = by_name(lines_of(result.out))
    assert sorted(lines) == [("prompt 1", 0), ("prompt 2", 0)]
    line = lines["prompt 1", 0]
    trajectory = Trajectory.from_json(line["trajectory"])
    assert line["question"] == "a:1+2?"
    assert line["finish"] == str(trajectory.finish)
    assert line["total_tokens"] == trajectory.num_tokens == NUM_POSITIONS // 2
    assert line["critical_path_tokens"] == trajectory.critical_path_tokens
    assert all(trajectory.logprobs[trajectory.prompt_length :] < 0)
    assert line["resident_kv_tokens"] == len(trajectory.token_ids) - 1
    held = sum(box["num_tokens"] for box in line["outline"])
    assert 0 < held <= line["total_tokens"]


def test_bad_prompts_are_named_before_the_others_are_answered(npr, model):
    long = "a" * NUM_POSITIONS
    result = npr("generate", model, "a:1?", "B*D", long, "b:2?", "--json")
    assert result.code == 2
    assert sorted(by_name(lines_of(result.out))) == [("prompt 1", 0), ("prompt 4", 0)]
    first, second, count = result.err.splitlines()
    assert first.startswith("error: prompt 2: text was to be encoded: 'B*D\\n'")
    assert second.startswith("error: prompt 3: prompt and critical path may reach 66 positions")
    assert count == "2 of 4 prompts were refused"


def test_a_long_prompt_gets_the_room_there_is_unless_a_budget_is_asked_for(npr, model):
    prompt = "a" * (NUM_POSITIONS - 9)
    (line,) = lines_of(npr("generate", model, prompt, "--json", "--mode", "sequential").out)
    assert line["total_tokens"] == 8
    result = npr("generate", model, prompt, "--json", "--max-new-tokens", "9")
    assert result.code == 2
    assert "may reach 65 positions" in result.err


def test_samples_differ_and_equal_seeds_give_equal_answers(npr, model):
    command = ["generate", model, "a:1?", "--samples", "3", "--temperature", "1", "--json"]
    options = ["--top-p", "0.9", "--top-k", "30", "--min-p", "0.01", "--repetition-penalty", "1.1"]
    first = texts(lines_of(npr(*command, *options).out))
    assert len(set(first.values())) == 3
    assert texts(lines_of(npr(*command, *options, "--max-running", "1").out)) == first
    assert texts(lines_of(npr(*command, *options, "--seed", "1").out)) != first


def test_several_samples_at_temperature_0_are_refused(npr, model):
    result = npr("generate", model, "a:1?", "--samples", "2")
    assert result.code == 2
    assert result.err.endswith("would be the same; add --temperature 1\n")


@pytest.mark.parametrize(
    ("policy", "finish"), [("sequential", {"length", "stop"}), ("terminate", {"malformed"})]
)
def test_a_refused_fork_goes_on_as_text_or_ends(npr, model, policy, finish):
    result = npr("generate", model, "a:1?", "--on-refusal", policy, "--json")
    (line,) = lines_of(result.out)
    assert line["finish"] in finish
    assert line["finish_detail"]


def test_a_timeout_keeps_what_was_said(npr, model):
    result = npr("generate", model, "a:1?", "--timeout", "0.001", "--mode", "sequential", "--json")
    (line,) = lines_of(result.out)
    assert result.code == 0
    assert line["finish"] == "timeout"
    assert line["total_tokens"] < NUM_POSITIONS // 2


def test_the_same_command_goes_on_where_it_was_stopped(npr, model, tmp_path):
    prompts, output = tmp_path / "p.txt", tmp_path / "new" / "answers.jsonl"
    prompts.write_text("a:1?\nb:2?\nc:3?\nd:4?\n")
    command = ["generate", model, "--file", str(prompts), "--output", str(output)]
    first = npr(*command)
    assert first.code == 0
    assert "4 of 4 answered" in first.out
    whole = output.read_text()
    lines = whole.splitlines(keepends=True)

    output.write_text("".join(lines[:2]) + lines[2][:50])  # killed in the middle of a line
    second = npr(*command)
    assert "2 answered before, 2 to go" in second.out
    assert texts(lines_of(output.read_text())) == texts(lines_of(whole))
    assert npr(*command).out == "4 answered before, 0 to go\n"

    assert npr(*command, "--max-new-tokens", "3").code == 0  # other settings, other answers
    assert len(output.read_text().splitlines()) == 8


def test_a_file_of_something_else_is_not_appended_to(tmp_path):
    path = tmp_path / "notes.jsonl"
    for content in ('{"question": "a"}\n', "notes\n"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"notes\.jsonl:1 is no"):
            AnswerFile(path)
        assert path.read_text() == content
    with pytest.raises(InputError, match="name a file that can be written"):
        AnswerFile(tmp_path)


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(npr, model, device):
    result = npr("generate", model, "a:1?", "--device", device)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert device in result.err
    assert result.err.count("\n") == 1


def test_answers_are_printed_as_trees(npr, model):
    result = npr("generate", model, "a:1?", "--mode", "sequential", "--dtype", "bf16")
    assert result.code == 0, result.err
    assert result.out.splitlines()[0].startswith("prompt 1 #0  sequential | ")
    assert "1 of 1 answered in" in result.out.splitlines()[-1]
