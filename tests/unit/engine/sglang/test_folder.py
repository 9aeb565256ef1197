"""Folders of engines: a living owner keeps its own, a dead one's is removed by the next engine."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from npr_megatron.engine.sglang.folder import EngineFolder, remove_dead_folders

_OWNER = """
import os, signal, sys
from pathlib import Path
from npr_megatron.engine.sglang.folder import EngineFolder, remove_together
folder = EngineFolder()
(folder.path / "sglang.log").write_text("words")
remove_together(folder.path, Path(sys.argv[1]))
print(folder.path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where folders lie, of this test only."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_a_folder_lives_as_long_as_its_owner_wants():
    folder = EngineFolder()
    assert remove_dead_folders() == 0
    assert folder.path.is_dir()
    folder.close()
    folder.close()
    assert not folder.path.exists()


def test_the_next_engine_removes_what_a_killed_one_left(root):
    elsewhere = root / "elsewhere"
    elsewhere.touch()
    command = [sys.executable, "-c", _OWNER, str(elsewhere)]
    owner = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    left = Path(owner.stdout.strip())
    assert (left / "sglang.log").exists()
    assert left.parent == root
    (root / "npr-sglang-file").touch()  # control: no folder, and not ours
    (root / "npr-other").mkdir()
    folder = EngineFolder()
    found = {path.name for path in root.iterdir()}
    assert found == {folder.path.name, "npr-sglang-file", "npr-other"}
    folder.close()
