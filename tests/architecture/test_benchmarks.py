"""The benchmark of weights runs and judges; what it measures is not asserted here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ("--layers", "1", "--hidden", "64", "--repeats", "1", "--planned-model", "qwen3-0.6b")


@pytest.mark.slow
def test_the_benchmark_of_weights_measures_every_promise(tmp_path):
    command = [sys.executable, str(ROOT / "tools/bench_weights.py"), "--json", *SMALL]
    folders = ["--arena-dir", str(tmp_path), "--disk-dir", str(tmp_path)]
    result = subprocess.run(
        [*command, *folders], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    judged = [figure["name"].split(",")[0] for figure in figures if figure["bar"] is not None]
    for promise in ("shared memory / memcpy", "fixed cost", "gloo", "digest", "planning"):
        assert any(name.startswith(promise) for name in judged), promise
    assert all(figure["value"] > 0 for figure in figures)
    assert {figure["verdict"] for figure in figures} <= {"PASS", "MISS", ""}
    assert list(tmp_path.iterdir()) == []
