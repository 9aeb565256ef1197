"""What a user types: help teaches, bad input is listed whole with exit code 2, JSON stays clean."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from npr_megatron import __version__
from tests.unit.report.runs import sums_tokenizer, write_run

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "examples" / "quickstart" / "run.toml")


def test_help_lists_the_commands_and_says_where_to_start(npr):
    result = npr("--help")
    assert result.code == 0
    assert "npr pipeline examples/quickstart/run.toml" in result.out
    for command in ("pipeline", "generate", "report", "check", "schema"):
        assert f" {command} " in result.out


@pytest.mark.parametrize("command", ["pipeline", "generate", "report", "check", "schema"])
def test_help_of_every_command_has_an_example(npr, command):
    result = npr(command, "--help")
    assert result.code == 0
    assert "Example" in result.out
    assert f"npr {command} " in result.out.split("Example")[1]


def test_the_version_is_the_package_version(npr):
    assert npr("--version").out == f"npr-megatron {__version__}\n"


def test_check_accepts_a_good_file_and_prints_the_resolved_run(npr):
    assert npr("check", QUICKSTART).out == f"{QUICKSTART}: no problem found\n"
    resolved = json.loads(npr("check", QUICKSTART, "zero.num_steps=7", "--json").out)
    assert resolved["zero"]["num_steps"] == 7
    assert resolved["engine"]["num_kv_slots"] == 65536


@pytest.mark.parametrize("command", [["check"], ["pipeline"], ["pipeline", "--dry-run"]])
def test_every_problem_is_listed_without_a_stack_trace(npr, command):
    result = npr(*command, QUICKSTART, "zero.num_stepz=1", "trainer.dtype=fp8")
    assert result.code == 2
    assert result.out == ""
    assert result.err.splitlines() == [
        'error: trainer.dtype is "fp8"; set it to "fp32" or "bf16"',
        "error: zero.num_stepz is not a key of [zero]; did you mean num_steps?",
        "2 problems found",
    ]


def test_problems_between_sections_are_found_before_anything_starts(npr):
    result = npr("pipeline", QUICKSTART, "parallel.pp_size=3")
    assert result.code == 2
    assert "num_hidden_layers 4 is not a multiple of parallel.pp_size 3" in result.err


def test_a_missing_run_file_is_one_line(npr):
    result = npr("check", "none.toml")
    assert result.code == 2
    assert result.err == (
        "error: run file none.toml does not exist; give the path of a .toml file\n1 problem found\n"
    )


def test_a_dry_run_says_what_would_run_and_stops_where_asked(npr):
    result = npr("pipeline", QUICKSTART, "--dry-run", "--seed", "3", "parallel.tp_size=2")
    assert result.code == 0
    for part in ("seed 3", "4 ranks = tp 2 x pp 2 x dp 1", "2 replicas", "quickstart-seed3", "npr"):
        assert part in result.out
    shorter = npr("pipeline", QUICKSTART, "--dry-run", "--until", "zero").out
    assert "zero" in shorter
    assert "beta" not in shorter


def test_a_dry_run_in_json_is_the_resolved_run(npr):
    resolved = json.loads(npr("pipeline", QUICKSTART, "--dry-run", "--json", "--seed", "3").out)
    assert resolved["run"]["seed"] == 3


def test_an_unknown_stage_is_refused_with_the_choice(npr):
    result = npr("pipeline", QUICKSTART, "--until", "papo", "--dry-run")
    assert result.code == 2
    assert "'papo' is no stage; choose one of seed, zero, sample, beta, npr" in result.err


@pytest.mark.parametrize(
    "arguments", [["check"], ["nonsense"], ["pipeline", "x.toml", "--nonsense"]]
)
def test_wrong_usage_ends_with_code_2(npr, arguments):
    result = npr(*arguments)
    assert result.code == 2
    assert "Usage" in result.err


def test_report_prints_the_table_and_the_page(npr, tmp_path):
    run = write_run(tmp_path / "run", sums_tokenizer(tmp_path))
    (run / "metrics.jsonl").unlink()  # charts are tested with the page itself
    result = npr("report", str(run))
    assert result.code == 0
    assert "99.0%" in result.out
    assert result.out.endswith(f"{run / 'report.html'}\n")
    described = json.loads(npr("report", str(run), "--json").out)
    assert described["report"] == str(run / "report.html")
    assert described["evaluations"][-1]["stage"] == "npr"


def test_report_of_no_run_is_one_line(npr, tmp_path):
    result = npr("report", str(tmp_path))
    assert result.code == 2
    assert result.err.startswith(f"error: {tmp_path} holds no run")
    assert result.err.count("\n") == 1


INTERRUPTED = """
import sys, time
from npr_megatron.cli.interrupt import interruptible
import typer

def command():
    with interruptible("start again to go on"):
        try:
            print("running", flush=True)
            time.sleep(30)
        finally:
            print("cleaned up", flush=True)

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(command)
app()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cleans_up_says_one_line_and_ends_with_the_shells_code(number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert out == "cleaned up\n"
    assert err == f"stopped by {signal.Signals(number).name}; start again to go on\n"
    assert process.returncode == code


def test_mistakes_of_ours_keep_their_traceback():
    code = (
        "import sys; from npr_megatron.cli import main, report\n"
        "@main.app.command()\n"
        "def burst() -> None:\n"
        "    raise RuntimeError('ours')\n"
        "sys.argv = ['npr', 'burst']; main.main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("RuntimeError: ours\n")
