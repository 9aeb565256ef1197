"""A run file is read whole or refused with every problem, each naming path, finding and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from npr_megatron.config.loader import load_run, parse_value
from npr_megatron.errors import ConfigError

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart" / "run.toml"


def problems_of(path: Path, overrides: list[str] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides or [])
    return caught.value.problems


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("true", True),
        ('"3"', "3"),
        ("[1, 2]", [1, 2]),
        ("{ a = 0.5 }", {"a": 0.5}),
        ("runs/here", "runs/here"),
        ("", ""),
        ("1\nother = 2", "1\nother = 2"),
    ],
)
def test_values_are_toml_and_anything_else_is_a_bare_string(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_overrides_replace_fields_of_tables_arrays_and_absent_tables():
    config = load_run(
        QUICKSTART,
        [
            "zero.num_steps=3",
            "seed_stage.phases.1.num_steps=7",
            "beta.optimizer.learning_rate=1e-4",
            "trainer.dtype=bf16",
            "run.output_dir=/scratch/me",
        ],
    )
    assert config.zero.num_steps == 3
    assert config.seed_stage is not None
    assert [phase.num_steps for phase in config.seed_stage.phases][1] == 7
    assert config.beta.optimizer.learning_rate == 1e-4
    assert config.trainer.dtype == "bf16"
    assert config.run.output_dir == "/scratch/me"


def test_later_overrides_win():
    assert load_run(QUICKSTART, ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize("text", ["7", "true", "2026-01-31", "1e3"])
def test_an_override_of_a_string_field_needs_no_quotes_whatever_it_looks_like(text):
    assert load_run(QUICKSTART, [f"run.name={text}"]).run.name == text


def test_a_configuration_survives_the_way_through_json():
    config = load_run(QUICKSTART)
    assert type(config).model_validate_json(config.model_dump_json()) == config


def test_an_unknown_key_names_the_nearest_one():
    (problem,) = problems_of(QUICKSTART, ["zero.num_stepz=3"])
    assert problem == "zero.num_stepz is not a key of [zero]; did you mean num_steps?"


def test_an_unknown_key_without_a_near_one_lists_all_keys():
    (problem,) = problems_of(QUICKSTART, ["fleet.colour=1"])
    assert "its keys are num_replicas, request_timeout_s, push_timeout_s, max_restarts" in problem


def test_every_problem_is_reported_at_once():
    problems = problems_of(
        QUICKSTART,
        [
            "nonsense",
            "seed_stage.phases.5.num_steps=1",
            "run.name.first=x",
            "zero.num_steps=0",
            "trainer.dtype=fp8",
            "task.max_parts=12",
            "npr.optimizer.learning_rate=inf",
            "trainer.rows_per_microbatch=true",
            "seed_stage.phases.0.mixture.broken=much",
        ],
    )
    expected = [
        "override 'nonsense' is not of the form section.key=value",
        "seed_stage.phases has 2 entries, found '5'",
        "run.name is 'quickstart' and has no keys",
        "task.max_parts is 12; set it to an integer, at least 1, at most 9",
        'trainer.dtype is "fp8"; set it to "fp32" or "bf16"',
        "trainer.rows_per_microbatch is true; set it to an integer, above 0",
        'seed_stage.phases.0.mixture.broken is "much"; set it to a number',
        "zero.num_steps is 0; set it to an integer, above 0",
        "npr.optimizer.learning_rate is Infinity; set it to a number",
    ]
    assert len(problems) == len(expected)
    for problem, part in zip(problems, expected, strict=True):
        assert part in problem


def test_missing_tables_and_keys_say_what_to_add(tmp_path):
    path = write(tmp_path, '[run]\n[model]\n[task]\nkind = "sumz"\n[zero]\nnum_steps = 1\n')
    problems = problems_of(path)
    assert "run.name is missing; add name = <a string> to [run]" in problems
    assert 'task.kind is "sumz"; set it to "jsonl" or "sums"' in problems
    assert "npr is missing; add a table [npr] with num_steps, optimizer" in problems
    assert "zero.optimizer is missing; add a table [zero.optimizer] with learning_rate" in problems


def test_a_task_without_kind_is_told_the_kinds(tmp_path):
    path = write(tmp_path, QUICKSTART.read_text().replace('kind = "sums"', ""))
    assert problems_of(path) == ('task.kind is missing; set it to "jsonl" or "sums"',)


def test_problems_of_a_field_explain_the_field():
    (problem,) = problems_of(QUICKSTART, ["trainer.row_tokens=-1"])
    assert "trainer.row_tokens (Longest packed row [tokens]" in problem


def test_a_missing_file_and_broken_toml_are_one_clear_problem(tmp_path):
    assert problems_of(tmp_path / "none.toml")[0].endswith(
        "none.toml does not exist; give the path of a .toml file"
    )
    (problem,) = problems_of(write(tmp_path, "[run\nname = 1"))
    assert "is not valid TOML" in problem
    assert "line 1" in problem
    (problem,) = problems_of(tmp_path)
    assert "cannot be read" in problem
