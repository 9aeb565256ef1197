"""The run folder: what a run has finished, so that a second start goes on from there.

    config.json        the resolved run
    state.json         finished stages
    metrics.jsonl      one line per optimizer step
    evaluations.jsonl  one line per measurement
    samples.jsonl      a few trajectories per stage, for eyes
    serving.json       weight version and health of every replica, as of the last change
    driver.log         events, such as a replica lost and replaced
    stages/<name>/     checkpoints/ while it runs, hf/ when it is done
    report.html

Files that decide where to resume are replaced atomically; logs are appended, and cut back to the
last checkpoint on resume, so a step is never counted twice.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from npr_megatron.config.run import RunConfig
from npr_megatron.config.sft import SftConfig
from npr_megatron.config.stages import STAGES, StageName
from npr_megatron.errors import InputError

# What may differ between two starts of one run without making it another run.
_FREE_SECTIONS = ("fleet", "cluster", "checkpoint")
# Batches do not depend on the layout, and checkpoints are read by any.
_FREE_SFT_SECTIONS = ("parallel", "checkpoint")


class RunFolder:
    """Paths and small files of one run. Used by the driver process only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.samples = path / "samples.jsonl"
        self._state = path / "state.json"

    @classmethod
    def of(cls, config: RunConfig | SftConfig) -> RunFolder:
        """Return the folder that ``config`` names, not yet created."""
        return cls(Path(config.run.output_dir) / f"{config.run.name}-seed{config.run.seed}")

    def open(self, config: RunConfig | SftConfig, *, fresh: bool) -> None:
        """Create or reopen the folder; ``fresh`` discards what is there.

        Raises:
            InputError: the folder holds a run with another configuration.
        """
        if fresh and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        resolved = config.model_dump(mode="json")
        free = _FREE_SECTIONS if isinstance(config, RunConfig) else _FREE_SFT_SECTIONS
        recorded = self.path / "config.json"
        if recorded.exists():
            changed = _changed_sections(json.loads(recorded.read_text()), resolved, free)
            if changed:
                raise InputError(
                    f"{self.path} holds a run whose {', '.join(changed)} section differs from this "
                    "one; resume it with the same settings, choose another run.name, or start over "
                    "with --fresh"
                )
        _write_atomically(recorded, json.dumps(resolved, indent=2))

    def stage(self, name: StageName) -> Path:
        """Return the folder of a stage, created."""
        path = self.path / "stages" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def hf(self, name: StageName) -> Path:
        """Return where the model that a stage produced is exported."""
        return self.stage(name) / "hf"

    def checkpoints(self, name: StageName) -> Path:
        """Return where a running stage keeps the trainer's state."""
        return self.stage(name) / "checkpoints"

    def finished(self) -> tuple[StageName, ...]:
        """Return the finished stages in order."""
        if not self._state.exists():
            return ()
        done = json.loads(self._state.read_text())["finished"]
        return tuple(name for name in STAGES if name in done)

    def finish(self, name: StageName) -> None:
        """Record a stage as finished; its checkpoints are dropped afterwards."""
        _write_atomically(self._state, json.dumps({"finished": [*self.finished(), name]}))
        shutil.rmtree(self.checkpoints(name), ignore_errors=True)

    def append(self, path: Path, line: Mapping[str, Any]) -> None:
        """Append one JSON line to a log of this folder."""
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def rewind(self, stage: str, step: int) -> None:
        """Cut the logs back to what had happened when ``step`` of ``stage`` was saved."""
        unsaved = lambda line: line["stage"] == stage and line.get("step", 0) > step  # noqa: E731
        for path in (self.metrics, self.samples):
            _drop_lines(path, unsaved)
        _drop_lines(self.evaluations, lambda line: line["stage"] == stage)


def _changed_sections(
    recorded: Mapping[str, Any], resolved: Mapping[str, Any], free: Sequence[str]
) -> list[str]:
    names = sorted(set(recorded) | set(resolved))
    return [name for name in names if name not in free and recorded.get(name) != resolved.get(name)]


def _drop_lines(path: Path, unwanted: Callable[[dict[str, Any]], bool]) -> None:
    """Remove unwanted lines, and the torn last line that a kill may have left."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not unwanted(record):
            kept.append(line + "\n")
    _write_atomically(path, "".join(kept))


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
