"""What ``npr sft`` says before a trainer is started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.config.test_check_sft import GOOD

ROOT = Path(__file__).parents[3]


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(GOOD)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a:1+2?", "response": "3"}\n' * 20)
    return path


def test_help_teaches_rows_and_launchers(npr):
    text = " ".join(npr("sft", "--help").out.split())
    for taught in (
        '"messages"',
        '"response"',
        "--check",
        "--dry-run",
        "torchrun",
        "srun",
        "resumes",
    ):
        assert taught in text


def test_check_needs_nothing_heavy(run_file):
    heavy = ["torch", "megatron", "ray", "transformers", "tokenizers"]
    code = (
        "import sys\n"
        f"for name in {heavy!r}: sys.modules[name] = None\n"  # importing it now fails
        f"sys.argv = ['npr', 'sft', {str(run_file)!r}, '--check']\n"
        "from npr_megatron.cli.main import main\nmain()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"{run_file}: no problem found\n"


def test_check_names_every_bad_row(npr, run_file):
    with Path("train.jsonl").open("a") as file:
        file.write('{"prompt": 7, "response": "3"}\nnot json\n')
    ended = npr("sft", str(run_file), "--check")
    assert ended.code == 2
    assert ended.err.splitlines() == [
        "error: train.jsonl:21: prompt is 7; it must be text",
        "error: train.jsonl:22: not JSON (Expecting value at column 1)",
        "2 problems found",
    ]


def test_check_prints_the_resolved_run(npr, run_file):
    ended = npr("sft", str(run_file), "sft.rows_per_step=32", "--check", "--json")
    assert json.loads(ended.out)["sft"]["rows_per_step"] == 32


def test_dry_run_shows_what_is_learnt_and_writes_nothing(npr, run_file, tmp_path):
    ended = npr("sft", str(run_file), "--dry-run", "data.validation_frac=0")
    assert ended.code == 0
    assert "20 samples, 180 tokens, 22% of them learnt; 1 steps of 16 rows" in ended.out
    assert "train.jsonl:1: 9 tokens, 2 learnt" in ended.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml", "train.jsonl"]


def test_the_number_of_processes_must_be_the_layouts(npr, run_file, monkeypatch):
    changes = ("parallel.dp_size=2",)
    ended = npr("sft", str(run_file), *changes)
    assert ended.code == 2
    assert "[parallel] asks for 2 ranks and a single process started 1" in ended.err
    assert "torchrun --nproc-per-node 2" in ended.err
    launched = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    for name, value in {**launched, "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    silent = npr("sft", str(run_file), *changes)
    assert (silent.code, silent.err) == (2, ""), "rank 0 says it for all"


def test_a_tokenizer_or_model_that_does_not_fit_is_refused(npr, run_file):
    ended = npr("sft", str(run_file), "--dry-run", "model.architecture.vocab_size=50")
    assert ended.code == 2
    assert "the tokenizer has 56 tokens and the model 50 embedding rows" in ended.err


def test_editors_can_ask_for_the_schema_of_these_run_files(npr):
    schema = json.loads(npr("schema", "--sft").out)
    sections = {"run", "model", "data", "parallel", "trainer", "checkpoint", "sft"}
    assert set(schema["properties"]) == sections
    described = schema["$defs"]["DataSection"]["properties"]
    assert all("description" in field for field in described.values())
