"""The tools: valid shell, runnable from anywhere, quick when nothing changed, and gates that
close."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    *sorted(
        path for path in (ROOT / "tools").iterdir() if path.is_file() and path.suffix in ("", ".sh")
    ),
    ROOT / ".ci/run",
]

# Stands in for every program of .venv: notes how it was called, fails when told to.
PROGRAM = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$NOTES"
[[ "${FAIL:-}" != "$(basename "$0")" ]]
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose .venv is complete and made of stand-ins."""
    root = tmp_path / "checkout"
    for name in ("tools", ".ci"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "pyproject.toml", root)
    programs = root / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "npr", "ruff", "lint-imports", "pyright"):
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)
    return root


def stamp(root: Path, extra: str) -> None:
    """Mark the environment as set up, as the last installation would have."""
    text = 'cat "$1/pyproject.toml" "$1/tools/constraints-cpu.txt" "$1/tools/setup.sh" | sha256sum'
    made = subprocess.run(
        ["bash", "-c", text, "-", str(root)], capture_output=True, text=True, check=True
    )
    (root / ".venv" / f".setup-{extra}").write_text(made.stdout)


def call(
    root: Path, script: str, *arguments: str, **environment: str
) -> tuple[int, list[str], str]:
    """Run a tool from another folder; return its code, the programs it called and its output."""
    notes = root / "notes"
    notes.write_text("")
    result = subprocess.run(
        ["bash", str(root / script), *arguments],
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "NOTES": str(notes), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    called = [line.rstrip() for line in notes.read_text().splitlines()]
    return result.returncode, called, result.stdout + result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_is_valid_shell(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_quickstart_runs_the_main_job_with_its_options_and_installs_nothing_twice(checkout):
    stamp(checkout, "run")
    code, called, _ = call(checkout, "tools/quickstart", "--seed", "1")
    assert (code, called) == (0, ["npr pipeline examples/quickstart/run.toml --seed 1"])


def test_an_environment_for_testing_can_run_the_quickstart_too(checkout):
    stamp(checkout, "dev")
    _, called, _ = call(checkout, "tools/quickstart")
    assert called == ["npr pipeline examples/quickstart/run.toml"]


@pytest.mark.parametrize("changed", ["pyproject.toml", "tools/constraints-cpu.txt"])
def test_a_changed_requirement_installs_again_with_the_constraints(checkout, changed):
    stamp(checkout, "dev")
    with (checkout / changed).open("a") as file:
        file.write("# changed\n")
    _, called, output = call(checkout, "tools/test")
    assert "setting up .venv" in output
    assert any(f"--editable {checkout}[dev] --constraint" in line for line in called)


def test_a_failed_installation_is_not_taken_for_done(checkout):
    code, called, _ = call(checkout, "tools/test", FAIL="python")
    assert code != 0
    assert not (checkout / ".venv" / ".setup-dev").exists()
    assert not any("pytest" in line for line in called)


def test_check_runs_every_gate_then_the_tests(checkout):
    stamp(checkout, "dev")
    code, called, _ = call(checkout, "tools/check", "-k", "nothing")
    assert code == 0
    assert called == [
        "ruff check .",
        "ruff format --check .",
        "lint-imports",
        "pyright",
        "python -m pytest -k nothing",
    ]


@pytest.mark.parametrize("gate", ["ruff", "lint-imports", "pyright", "python"])
def test_a_failing_gate_fails_the_check(checkout, gate):
    stamp(checkout, "dev")
    code, _, _ = call(checkout, "tools/check", FAIL=gate)
    assert code != 0


def test_ci_runs_the_tests_and_its_last_line_says_how_it_ended(checkout):
    stamp(checkout, "dev")
    code, called, output = call(checkout, ".ci/run")
    assert (code, called) == (0, ["python -m pytest"])
    assert output.splitlines()[-1].startswith("ci: passed in ")
    code, _, output = call(checkout, ".ci/run", FAIL="python")
    assert code == 1
    assert output.splitlines()[-1].startswith("ci: failed with code 1")


def test_no_interpreter_is_one_clear_message(checkout):
    shutil.rmtree(checkout / ".venv")
    code, _, output = call(checkout, "tools/test", PYTHON="python-that-is-not-there")
    assert code == 2
    assert output.splitlines()[-1].startswith("no Python 3.11 or newer was found")
