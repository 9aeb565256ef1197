"""Start the real command on a run small enough for a test, watch it, and hurt it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples/quickstart/run.toml"
NPR = str(Path(sys.executable).parent / "npr")
GPU_EXAMPLE = ROOT / "examples/qwen3-4b/run.toml"
SMALL = (
    "task.min_parts=2",
    "task.max_parts=3",
    "task.addends=2",
    "task.max_addend=4",
    "seed_stage.phases.0.num_steps=120",
    "seed_stage.phases.0.mixture={well_formed=0.8, sequential=0.2}",
    "seed_stage.phases.1.num_steps=6",
    "seed_stage.phases.1.mixture={well_formed=0.6, sequential=0.4}",
    "zero.num_steps=6",
    "zero.prompts_per_step=4",
    "zero.rollouts_per_prompt=4",
    "sample.num_accepted=8",
    "sample.prompts_per_round=32",
    "beta.num_steps=12",
    "npr.num_steps=6",
    "npr.prompts_per_step=4",
    "npr.rollouts_per_prompt=4",
    "evaluation.num_problems=8",
    "evaluation.speed_problems=2",
    "checkpoint.every_sft_steps=20",
)
"""Three stages in seconds: enough skill that rejection sampling accepts something, no more."""
ON_A_LAPTOP = (
    "trainer.dtype=fp32",
    "engine.dtype=fp32",
    "engine.num_kv_slots=16384",
    "fleet.num_replicas=2",
    "cluster.cpus_per_trainer=0.5",
    "cluster.cpus_per_replica=0.5",
    "cluster.gpus_per_trainer=0",
    "cluster.gpus_per_replica=0",
    "parallel.tp_size=2",
    "trainer.row_tokens=256",
    "sampling.max_new_tokens=200",
    "sampling.max_critical_path=200",
)
"""What the run file for eight GPUs needs changed to start on two cores."""
DEADLINE_S = 240.0


@dataclass
class Run:
    """One started ``npr pipeline``."""

    process: subprocess.Popen[str]
    folder: Path
    log: Path

    def output(self) -> str:
        return self.log.read_text()

    def steps(self, stage: str) -> dict[int, dict[str, float]]:
        """Return the metrics of a stage by step."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = {}
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if record["stage"] == stage:
                found[record["step"]] = record
        return found

    def wait_for_step(self, stage: str, step: int, deadline_s: float = DEADLINE_S) -> None:
        deadline = time.monotonic() + deadline_s
        while step not in self.steps(stage):
            assert self.process.poll() is None, f"ended early:\n{self.output()}"
            assert time.monotonic() < deadline, f"{stage} {step} never came:\n{self.output()}"
            time.sleep(0.05)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"did not end:\n{self.output()}") from None

    def replica_pids(self) -> list[int]:
        (line,) = re.findall(r"replicas: process ids (.+)", self.output())
        return [int(pid) for pid in line.split(",")]


def start(
    tmp_path: Path,
    *overrides: str,
    name: str = "small",
    run_file: Path = QUICKSTART,
    seed: int = 0,
    until: str | None = None,
) -> Run:
    """Start ``npr pipeline`` on a run file; results go below ``tmp_path``."""
    log = tmp_path / f"{name}.log"
    arguments = [str(run_file), f"run.name={name}", f"run.output_dir={tmp_path}", *overrides]
    arguments += ["--seed", str(seed), *(["--until", until] if until else [])]
    with log.open("a") as file:
        process = subprocess.Popen(
            [NPR, "pipeline", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "160", "PYTHONUNBUFFERED": "1"},
        )
    return Run(process=process, folder=tmp_path / f"{name}-seed{seed}", log=log)


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the processes that the run has started so far."""
    return psutil.Process(process.pid).children(recursive=True)


def survivors(processes: list[psutil.Process], within_s: float = 20.0) -> list[str]:
    """Return which of ``processes`` still run ``within_s`` after their parent ended."""
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return [" ".join(process.cmdline()[:3]) for process in alive if process.is_running()]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
