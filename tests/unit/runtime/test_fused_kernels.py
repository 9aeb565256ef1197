"""Whose apex and TransformerEngine are found, in processes of their own with folders in their path.

The real ``apex`` of PyPI is looked at where a package index can be asked; a stand-in always.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from npr_megatron.runtime.fused_kernels import NOT_INSTALLED, FusedKernels, fp8_problem

ROOT = Path(__file__).parents[3]
ASK = """
import json, sys
from npr_megatron.runtime import fused_kernels
fused_kernels._has_cuda = lambda: {has_cuda}  # without asking torch, which takes seconds to import
found = fused_kernels.fused_kernels()
fused_kernels.hide_unusable()
importable = {{}}
for name in ("apex", "transformer_engine"):
    try:
        importable[name] = bool(__import__(name))
    except ImportError:
        importable[name] = False
print(json.dumps([found.without_transformer_engine, found.without_apex, found.has_foreign_apex,
    found.has_fused_adam, found.describe(), importable]))
"""
MEGATRON = """
from megatron.core.models import backends
print(backends.HAVE_APEX)
"""
RUNS = 'open(__file__ + ".ran", "w")\n'


def python(program: str, *path: Path) -> str:
    """Return what a fresh interpreter prints with ``path`` before everything installed."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def ask(*path: Path, has_cuda: bool = False) -> tuple[FusedKernels, bool, str, dict[str, bool]]:
    """Return what is found, whether an Adam of NVIDIA's is, the line for the log, and imports."""
    answer = json.loads(python(ASK.format(has_cuda=has_cuda), *path))
    return FusedKernels(*answer[:3]), answer[3], answer[4], answer[5]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def pyramid_apex(tmp_path):
    """What PyPI installs, without what it imports of Pyramid: importing it would succeed."""
    files = dict.fromkeys(("forms", "interfaces", "models", "views", "lib/__init__"), "")
    return write(
        tmp_path,
        {f"apex/{name}.py": text for name, text in files.items()} | {"apex/__init__.py": RUNS},
    )


@pytest.fixture
def nvidia_apex(tmp_path):
    """NVIDIA's Python part."""
    names = ("__init__", "optimizers/__init__", "optimizers/fused_adam", "normalization/__init__")
    files = {f"apex/{name}.py": "" for name in (*names, "normalization/fused_layer_norm")}
    files["apex/optimizers/__init__.py"] = "class FusedAdam: pass\nclass FusedSGD: pass\n"
    return write(tmp_path, files)


def require_left_alone(folder: Path) -> None:
    for has_cuda in (False, True):
        found, has_adam, line, importable = ask(folder, has_cuda=has_cuda)
        assert found.has_foreign_apex and not has_adam
        assert f"the apex in {folder / 'apex'} is not NVIDIA's" in line
        assert "pip uninstall apex" in found.without_apex
        assert importable == {"apex": False, "transformer_engine": False}
    assert not list(folder.glob("apex/*.ran")), "its code ran"


def test_the_apex_of_pypi_is_named_and_never_run(pyramid_apex):
    require_left_alone(pyramid_apex)


def test_megatron_would_choose_the_apex_of_pypi_and_does_not(pyramid_apex):
    assert python(MEGATRON, pyramid_apex) == "True"
    assert python(f"import npr_megatron.train.rank\n{MEGATRON}", pyramid_apex) == "False"


def test_the_real_package_of_pypi_is_told_from_nvidias(tmp_path):
    pip = [sys.executable, "-m", "pip", "download", "apex==0.9.10.dev0", "--no-deps", "-qq"]
    options = ["--no-binary", ":all:", "--no-build-isolation", "--dest", str(tmp_path)]
    try:
        asked = subprocess.run([*pip, *options], capture_output=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("no package index answered in time")
    archives = list(tmp_path.glob("apex-*.tar.gz"))
    if not archives:
        pytest.skip(f"no package index has it: {asked.stderr.decode()[-200:]}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (path.parent for path in tmp_path.glob("apex-*/apex"))
    require_left_alone(unpacked)


def test_nvidias_apex_without_its_extensions_is_not_used(nvidia_apex):
    found, has_adam, line, importable = ask(nvidia_apex, has_cuda=True)
    assert "amp_C is missing): build it with --cpp_ext --cuda_ext" in line
    assert (found.has_foreign_apex, has_adam, importable["apex"]) == (False, False, False)


def test_nvidias_apex_gives_adam_where_transformer_engine_is_missing(nvidia_apex):
    write(nvidia_apex, {"amp_C.py": ""})
    found, has_adam, line, importable = ask(nvidia_apex, has_cuda=True)
    assert (found.without_apex, has_adam, importable["apex"]) == ("", True, True)
    assert line == (
        "kernels: linear layers and norms of torch, apex's fused Adam (TransformerEngine is not "
        "installed)"
    )


def test_without_a_device_nothing_of_nvidias_is_used(nvidia_apex):
    write(nvidia_apex, {"amp_C.py": "", "transformer_engine/__init__.py": RUNS})
    found, has_adam, _, importable = ask(nvidia_apex)
    assert found.without_transformer_engine.endswith("there is no CUDA device")
    assert found.without_apex.endswith("there is no CUDA device")
    assert (has_adam, importable) == (False, {"apex": False, "transformer_engine": False})


def test_a_transformer_engine_that_cannot_be_imported_is_not_used(tmp_path):
    metadata = "Metadata-Version: 2.1\nName: transformer-engine\nVersion: {}\n"
    info = "transformer_engine-1.dist-info/METADATA"
    broken = {"transformer_engine/__init__.py": "", info: metadata.format("2.20.2")}
    without = ask(write(tmp_path / "a", broken), has_cuda=True)[0].without_transformer_engine
    assert without.startswith("TransformerEngine cannot be imported (ModuleNotFoundError")
    whole = broken | {"transformer_engine/pytorch.py": ""}
    found, has_adam, line, importable = ask(write(tmp_path / "b", whole), has_cuda=True)
    assert (found.has_transformer_engine, has_adam, importable["transformer_engine"]) == (True,) * 3
    assert line == "kernels: TransformerEngine (linear layers, norms, Adam)"
    old = whole | {info: metadata.format("2.8")}
    without = ask(write(tmp_path / "c", old), has_cuda=True)[0].without_transformer_engine
    assert without == "TransformerEngine is 2.8 and 2.9 or newer is understood"


@pytest.mark.parametrize(
    ("recipe", "capability", "without", "expected"),
    [
        ("tensorwise", (9, 0), "", ""),
        ("blockwise", (9, 0), "", ""),
        ("mxfp8", (10, 0), "", ""),
        ("delayed", (8, 9), "", ""),
        ("delayed", None, "", "this process sees no NVIDIA GPU"),
        ("delayed", (8, 0), "", "compute capability 8.9, and this one has 8.0; use a newer GPU"),
        ("blockwise", (8, 9), "", "compute capability 9.0, and this one has 8.9"),
        ("mxfp8", (9, 0), "", 'take another recipe such as "tensorwise"'),
        ("tensorwise", (9, 0), NOT_INSTALLED, "bash tools/setup_te"),
    ],
)
def test_a_machine_that_cannot_train_in_fp8_is_told_in_one_sentence(
    recipe, capability, without, expected
):
    problem = fp8_problem(recipe, capability, without)
    assert expected in problem
    assert bool(problem) == bool(expected)
    assert problem.count("; ") == bool(problem)
