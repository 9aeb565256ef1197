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

# Stands in for every program of .venv: notes how it was called, fails when told to. The packages
# that it lists change with every call of pip when it is told that.
PROGRAM = """#!/usr/bin/env bash
call="$(basename "$0") $*"
echo "$call" >>"$NOTES"
if [[ "$call" == *"pip list"* ]]; then
  echo "torch==${CHANGES:+$(wc -l <"$NOTES").}2.13"
fi
if [[ -n "${FAIL:-}" && "$call" == "$FAIL"* ]]; then
  [[ -z "${SAYS:-}" ]] || echo "$SAYS" >&2
  exit "${CODE:-1}"
fi
"""
PIP = "python -m pip install -qq --no-compile --disable-pip-version-check"
SIDE_BY_SIDE = ("tests/architecture", "tests/examples", "tests/parity", "tests/unit")
TOGETHER = f"python -m pytest {' '.join(SIDE_BY_SIDE)} -n logical --maxprocesses 4 --dist worksteal"
WITH_RANKS = ("tests/end_to_end", "tests/distributed", "tests/ray")
BY_THE_CLOCK = ("tests/chaos",)
NAMED = (*SIDE_BY_SIDE, *WITH_RANKS, *BY_THE_CLOCK)
CLOCK = f"python -m pytest {' '.join(BY_THE_CLOCK)} -n 2"
RANKS = f"python -m pytest {' '.join(WITH_RANKS)}"
OTHERS = f"python -m pytest {' '.join(f'--ignore={folder}' for folder in NAMED)}"
PARTS = {
    "side by side": TOGETHER,
    "with servers": OTHERS,
    "with ranks": RANKS,
    "by the clock": CLOCK,
}


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


READ = {
    "run": ("../pyproject.toml", "constraints-cpu.txt", "setup.sh"),
    "dev": ("../pyproject.toml", "constraints-cpu.txt", "setup.sh"),
    "sglang": (
        "../pyproject.toml",
        "constraints-cpu.txt",
        "setup.sh",
        "setup_sglang",
        "sglang_torchvision.py",
    ),
}
"""Files in tools/ that an installation follows."""


def stamp(root: Path, *extras: str) -> None:
    """Mark the environment as set up, as the last installations would have."""
    for extra in extras:
        made = subprocess.run(
            ["bash", "-c", 'cat "$@" | sha256sum', "-", *READ[extra]],
            cwd=root / "tools",
            capture_output=True,
            text=True,
            check=True,
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


def test_what_python_compiles_is_kept_also_where_that_is_switched_off(checkout):
    stamp(checkout, "run")
    (checkout / ".venv/bin/npr").write_text('echo "set to ${PYTHONDONTWRITEBYTECODE-nothing}"')
    _, _, output = call(checkout, "tools/quickstart", PYTHONDONTWRITEBYTECODE="1")
    assert "set to nothing" in output


@pytest.mark.parametrize("changed", ["pyproject.toml", "tools/constraints-cpu.txt"])
def test_a_changed_requirement_installs_again_with_the_constraints(checkout, changed):
    stamp(checkout, "dev", "sglang")
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


def installed(called: list[str]) -> list[str]:
    """Return what pip was asked to install, without the check of torch before it."""
    return [line.removeprefix(f"{PIP} ") for line in called if line.startswith(PIP)]


def test_sglang_is_installed_without_its_requirements_and_only_once(checkout):
    stamp(checkout, "run")
    code, called, _ = call(checkout, "tools/setup_sglang")
    alone, imported = installed(called)
    assert code == 0
    assert alone.startswith("--no-deps sglang==")
    assert "openai" in imported and "--constraint" in imported
    assert called[-1] == "python -c import sglang"
    assert call(checkout, "tools/setup_sglang") == (0, [], "")


def test_with_cuda_sglang_comes_with_all_it_requires(checkout, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh")
    (tmp_path / "nvidia-smi").chmod(0o755)
    stamp(checkout, "run")
    _, called, _ = call(checkout, "tools/setup_sglang", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert called == [f"{PIP} --editable {checkout}[sglang]", "python -c import sglang"]


def test_sglang_that_changes_other_packages_is_refused(checkout):
    stamp(checkout, "run")
    code, _, output = call(checkout, "tools/setup_sglang", CHANGES="yes")
    assert code == 2
    assert "SGLang replaced packages of .venv" in output
    assert not (checkout / ".venv/.setup-sglang").exists()


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ("ERROR: ... requirement sglang==1 (from versions: none)", "no package index answered"),
        ("ERROR: ... requirement sglang==1 (from versions: 0.5)", "no package index has sglang==1"),
        ("ERROR: No space left on device", "ERROR: No space left on device"),
        ("Killed", "Killed"),
    ],
)
def test_where_sglang_cannot_be_had_the_reason_is_one_line_and_the_tests_run(
    checkout, errors, reason
):
    stamp(checkout, "dev")
    fails = {"FAIL": f"{PIP} --no-deps", "SAYS": errors}
    code, _, output = call(checkout, "tools/setup_sglang", **fails)
    said = output.splitlines()[-1]
    assert (code, said[: 27 + len(reason)]) == (3, f"SGLang cannot be had here: {reason}")
    assert (checkout / ".venv/.sglang-missing").read_text() == f"{said}\n"
    code, called, output = call(checkout, "tools/test", **fails)
    assert (code, called[-4], set(called[-3:-1])) == (0, TOGETHER, {OTHERS, RANKS})
    assert said in output


def test_an_sglang_that_cannot_be_imported_fails_the_tests(checkout):
    stamp(checkout, "dev")
    code, called, _ = call(checkout, "tools/test", FAIL="python -c import sglang")
    assert code == 2
    assert not any("pytest" in line for line in called)


def with_nvcc(folder: Path, release: str = "13.0") -> str:
    """Return a PATH on which a driver and a compiler of NVIDIA's are found."""
    for name, says in (("nvidia-smi", ""), ("nvcc", f"Cuda compilation tools, release {release}")):
        (folder / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_transformer_engine_is_compiled_against_the_torch_that_is_there(checkout, tmp_path):
    stamp(checkout, "run")
    code, called, _ = call(checkout, "tools/setup_te", PATH=with_nvcc(tmp_path))
    wheels, others, compiled = installed(called)
    assert code == 0
    assert wheels.startswith("--no-deps transformer-engine==")
    assert " transformer-engine-cu13==" in wheels
    assert others.startswith("--constraint ") and " ninja " in others
    assert compiled.startswith("--no-deps --no-build-isolation transformer-engine-torch==")
    assert called[-1] == "python -c import transformer_engine.pytorch"
    assert call(checkout, "tools/setup_te", PATH=with_nvcc(tmp_path)) == (0, [], "")


@pytest.mark.parametrize(
    ("fails", "said", "reason"),
    [
        (f"{PIP} --no-deps transformer-engine==", "ERROR: No matching", "ERROR: No matching"),
        (f"{PIP} --no-deps --no-build", "ops.cpp:7: error: no such type", "ops.cpp:7: error: no"),
        ("python -c import transformer", "ImportError: undefined symbol", "ImportError: undefined"),
    ],
)
def test_why_transformer_engine_cannot_be_built_is_the_last_line(
    checkout, tmp_path, fails, said, reason
):
    stamp(checkout, "run")
    environment = {"PATH": with_nvcc(tmp_path), "FAIL": fails, "SAYS": said}
    code, _, output = call(checkout, "tools/setup_te", **environment)
    last = output.splitlines()[-1]
    assert (code, last.startswith(f"TransformerEngine cannot be had here: {reason}")) == (3, True)
    assert not (checkout / ".venv/.setup-te").exists()
    assert said in (checkout / ".venv/.te-build.log").read_text()


def test_without_a_gpu_transformer_engine_is_not_tried(checkout):
    stamp(checkout, "run")
    code, called, output = call(checkout, "tools/setup_te")
    assert (code, called) == (3, [])
    assert output.endswith("this machine has no NVIDIA driver\n")


def test_check_runs_every_gate_then_the_tests(checkout):
    stamp(checkout, "dev", "sglang")
    code, called, _ = call(checkout, "tools/check", "-k", "nothing")
    assert code == 0
    assert called[:-3] == [
        "ruff check .",
        "ruff format --check .",
        "lint-imports",
        "pyright",
        f"{TOGETHER} -k nothing",
    ]
    assert set(called[-3:-1]) == {f"{OTHERS} -k nothing", f"{RANKS} -k nothing"}
    assert called[-1] == f"{CLOCK} -k nothing"


@pytest.mark.parametrize("gate", ["ruff", "lint-imports", "pyright", "python"])
def test_a_failing_gate_fails_the_check(checkout, gate):
    stamp(checkout, "dev", "sglang")
    code, _, _ = call(checkout, "tools/check", FAIL=gate)
    assert code != 0


def test_the_folders_that_are_named_exist():
    assert [
        folder
        for folder in (*SIDE_BY_SIDE, *WITH_RANKS, "tests/chaos")
        if not (ROOT / folder).is_dir()
    ] == []


@pytest.mark.parametrize("failing", PARTS.values())
def test_all_parts_of_the_tests_run_and_a_failure_of_any_counts(checkout, failing):
    stamp(checkout, "dev", "sglang")
    code, called, output = call(checkout, "tools/test", FAIL=failing)
    assert (code, called[0], set(called[1:])) == (1, TOGETHER, {OTHERS, RANKS, CLOCK})
    (last,) = output.splitlines()[-1:]
    for name, part in PARTS.items():
        end = "failed with code 1" if part == failing else "passed"
        assert f" {name} {end} in " in last


def test_a_part_without_a_selected_test_is_no_failure_unless_all_are(checkout):
    stamp(checkout, "dev", "sglang")
    code, _, output = call(checkout, "tools/test", FAIL=TOGETHER, CODE="5")
    assert (code, "side by side had nothing to run" in output) == (0, True)
    code, _, _ = call(checkout, "tools/test", FAIL="python -m pytest", CODE="5")
    assert code == 5


@pytest.mark.parametrize(("option", "failure"), [("-x", "1"), ("--maxfail=2", "1"), ("-v", "2")])
def test_a_failure_that_ends_the_tests_ends_all_parts(checkout, option, failure):
    stamp(checkout, "dev", "sglang")
    code, called, _ = call(checkout, "tools/test", option, FAIL="python -m pytest", CODE=failure)
    assert (code, called) == (int(failure), [f"{TOGETHER} {option}"])


def test_tests_named_by_their_path_run_in_one_go(checkout):
    stamp(checkout, "dev", "sglang")
    wanted = ("tools/test::test_one", "-k", "x")
    code, called, _ = call(checkout, "tools/test", *wanted)
    assert (code, called) == (0, [f"python -m pytest {' '.join(wanted)}"])


def test_ci_runs_the_tests_and_its_last_line_says_how_it_ended(checkout):
    stamp(checkout, "dev", "sglang")
    code, called, output = call(checkout, ".ci/run")
    assert (code, called[0], set(called[1:])) == (0, TOGETHER, {OTHERS, RANKS, CLOCK})
    assert output.splitlines()[-1].startswith("ci: passed in ")
    code, _, output = call(checkout, ".ci/run", FAIL="python")
    assert code == 1
    assert output.splitlines()[-1].startswith("ci: failed with code 1")


def test_no_interpreter_is_one_clear_message(checkout):
    shutil.rmtree(checkout / ".venv")
    code, _, output = call(checkout, "tools/test", PYTHON="python-that-is-not-there")
    assert code == 2
    assert output.splitlines()[-1].startswith("no Python 3.11 or newer was found")
