"""The shape of the code: layers, sizes, docstrings, and imports a login node can afford."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for folder in ("npr_megatron", "tests") for path in (ROOT / folder).rglob("*.py")
)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
LIGHT = ("errors", "config", "records", "schema", "observability", "planning", "cli")
HEAVY = {"torch", "megatron", "ray", "transformers", "matplotlib", "safetensors"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def modules(package: str) -> list[str]:
    base = ROOT / "npr_megatron" / package
    files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    dotted = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return [name.removesuffix(".__init__") for name in dotted]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def too_long(source: str) -> list[str]:
    """Return what exceeds the limits in ``source``."""
    found = []
    if (num_lines := len(source.splitlines())) > MAX_FILE_LINES:
        found.append(f"{num_lines} lines")
    for node in functions(ast.parse(source)):
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if num_lines > MAX_FUNCTION_LINES:
            found.append(f"{node.name} has {num_lines} lines")
    return found


def test_no_file_and_no_function_is_too_long():
    assert {name_of(p): found for p in SOURCES if (found := too_long(p.read_text()))} == {}


def test_the_length_check_sees_long_files_and_functions():
    assert too_long("x = 1\n" * 401) == ["401 lines"]
    assert too_long("def f():\n" + "    x = 1\n" * 80) == ["f has 81 lines"]


def test_every_module_says_what_it_is_for():
    silent = [
        name_of(path)
        for path in SOURCES
        if (path.name != "__init__.py" or "tests" not in path.parts)
        and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_nothing_is_left_for_later():
    words = ("TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error")
    found = [(name_of(p), word) for p in SOURCES for word in words if word in p.read_text()]
    assert found == []


@pytest.mark.parametrize("package", LIGHT)
def test_light_packages_import_nothing_heavy(package):
    code = (
        f"import importlib, sys\nfor name in {modules(package)!r}: importlib.import_module(name)\n"
        f"heavy = {sorted(HEAVY)!r}\nprint(*[name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""


def test_npr_check_works_where_nothing_heavy_is_installed():
    code = (
        "import sys\n"
        f"for name in {sorted(HEAVY)!r}: sys.modules[name] = None\n"  # importing it now fails
        "sys.argv = ['npr', 'check', 'examples/quickstart/run.toml']\n"
        "from npr_megatron.cli.main import main\nmain()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "examples/quickstart/run.toml: no problem found\n"


def test_the_import_layers_are_kept():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout
