"""The README tells the truth: its tree is the tree, its commands exist and are run by a test."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "README.md",
    "examples",
    "npr_megatron",
    "pyproject.toml",
    "tests",
    "tools",
}
# Commands too long for here, with the test that runs them or what stands behind them.
RUN_ELSEWHERE = {
    "bash tools/quickstart": "tests/end_to_end/test_runs.py",
    "bash tools/test": ".ci/run",
    "bash tools/setup_sglang": "tools/test",
    "bash tools/check": "tests/architecture/test_tools.py",
    ".venv/bin/npr pipeline examples/quickstart/run.toml --seed 1": "tests/end_to_end/test_runs.py",
    ".venv/bin/npr report runs/quickstart-seed0": "tests/unit/cli/test_commands.py",
    '.venv/bin/npr generate runs/quickstart-seed0/stages/npr/hf "a:1+2+9;b:3+5+4;c:7+7+2?"': (
        "tests/end_to_end/test_runs.py"
    ),
    ".venv/bin/npr generate runs/quickstart-seed0/stages/npr/hf --file problems.jsonl "
    "--output answers.jsonl": "tests/end_to_end/test_generate.py",
    'echo "a:1+2;b:3+4?" | .venv/bin/npr generate runs/quickstart-seed0/stages/npr/hf - '
    "--samples 4 --temperature 1 --json": "tests/unit/cli/test_generate.py",
    ".venv/bin/npr serve --model runs/quickstart-seed0/stages/npr/hf": (
        "tests/serving/test_command.py"
    ),
    "curl localhost:8000/v1/completions -d "
    """'{"prompt": "a:1+2+9;b:3+5+4;c:7+7+2?\\n", "stream": true}'""": (
        "tests/serving/test_command.py"
    ),
    ".venv/bin/npr weights convert runs/quickstart-seed0/stages/npr/hf megatron-npr "
    "--tp 2 --pp 2": "tests/end_to_end/test_runs.py",
    ".venv/bin/npr weights verify megatron-npr": "tests/end_to_end/test_runs.py",
    ".venv/bin/npr weights diff megatron-npr runs/quickstart-seed0/stages/npr/hf": (
        "tests/end_to_end/test_runs.py"
    ),
    "sbatch examples/qwen3-4b/launch.sbatch": "tests/examples/test_examples.py",
    ".venv/bin/npr sft examples/sft/run.toml": "tests/end_to_end/test_sft.py",
    ".venv/bin/torchrun --nproc-per-node 2 --no-python .venv/bin/npr sft examples/sft/run.toml "
    "parallel.dp_size=2": "tests/end_to_end/test_sft.py",
}
RUN_HERE = [
    ".venv/bin/npr weights plan qwen3-235b-a22b --trainer tp4,pp2,dp8,ep8,etp1 --engine tp8,ep8 "
    "--engines 512",
    ".venv/bin/npr weights simulate qwen3-4b --trainer dp8 --engines 512 --jitter 0.3 "
    "--slow-nodes 3",
    ".venv/bin/npr --help",
    ".venv/bin/npr check examples/quickstart/run.toml",
    ".venv/bin/npr pipeline examples/quickstart/run.toml --dry-run",
    ".venv/bin/npr sft examples/sft/run.toml --check",
    ".venv/bin/npr sft examples/sft/run.toml --dry-run",
]


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in fences if name == language]


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line]


def tree() -> set[str]:
    """Return the paths of the annotated tree, folders with a slash at the end."""
    paths, parent = set(), ""
    for line in blocks("")[-1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            parent = name
            paths.add(name)
        else:
            paths.add(parent + name)
    return paths


def folders(parent: str) -> set[str]:
    """Return the folders below ``parent`` that hold something of ours."""
    return {
        f"{parent}{path.name}/"
        for path in (ROOT / parent).iterdir()
        if path.is_dir() and any(child.suffix != ".pyc" for child in path.rglob("*?.*"))
    }


def test_the_annotated_tree_is_the_tree():
    below = folders("npr_megatron/") | folders("tests/") | folders("examples/")
    top = {".ci/", "examples/", "npr_megatron/", "tests/", "tools/", "pyproject.toml"}
    assert tree() == top | below


def test_every_line_of_the_tree_is_annotated():
    parents = {"examples/", "npr_megatron/", "tests/"}
    bare = {line.strip() for line in blocks("")[-1].splitlines() if len(line.split()) == 1}
    assert bare == parents


def test_the_top_level_holds_only_what_belongs_there():
    listed = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: the top level cannot be told from build products")
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} == TOP_LEVEL


def test_every_command_of_the_readme_is_run_by_a_test():
    assert sorted(commands()) == sorted([*RUN_ELSEWHERE, *RUN_HERE])
    assert [path for path in RUN_ELSEWHERE.values() if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("command", RUN_HERE)
def test_the_light_commands_of_the_readme_work_as_written(command):
    npr = str(Path(sys.executable).with_name("npr"))
    arguments = command.split()[1:]
    result = subprocess.run(
        [npr, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_links_of_all_readmes_lead_somewhere():
    broken = []
    for page in [ROOT / "README.md", *ROOT.glob("examples/*/README.md")]:
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if not target.startswith("http") and not (page.parent / target).exists():
                broken.append((page.name, target))
    assert broken == []
