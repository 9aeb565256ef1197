"""SGLang as the other engine of tools/bench_engine.py: processes of their own, frozen while not
measured.

Stock sequential decoding by SGLang: ids in and out, continuous batching, radix cache, one computing
thread on a core of its own. tools/setup_sglang installs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import psutil
from bench_engine_workload import Workload

_WORKER = Path(__file__).with_name("sglang_worker.py")


class Taken(NamedTuple):
    """What a run cost."""

    wall_s: float
    cpu_s: float
    """Of the process that computes."""


class SglangServer:
    """A running SGLang; close it by leaving its context.

    Args:
        model_folder: HF folder of the model.
        max_running: requests decoded at once.
        core: the one that computes.
        has_overlap: whether the next batch is scheduled while one is computed.
    """

    def __init__(self, model_folder: Path, max_running: int, core: int, has_overlap: bool) -> None:
        options = {
            "model_path": str(model_folder),
            "device": "cpu",
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "dtype": "float32",
            "max_total_tokens": 32_768,
            "max_running_requests": max_running,
            "disable_overlap_schedule": not has_overlap,
            "skip_tokenizer_init": True,
            "skip_server_warmup": True,
            "log_level": "error",
            "random_seed": 0,
        }
        answers, other_end = os.pipe()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed on exit)
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER), json.dumps(options), str(other_end)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
            env=os.environ | {"SGLANG_CPU_OMP_THREADS_BIND": str(core), "OMP_NUM_THREADS": "1"},
            pass_fds=[other_end],
        )
        os.close(other_end)
        self._answers = os.fdopen(answers)
        self._answer()
        (self._computing,) = (
            process for process in self._processes() if "scheduler" in process.cmdline()[0]
        )
        self._freeze()

    def serve(self, workload: Workload) -> Taken:
        """Return what it took to sample every response."""
        self._thaw()
        before = self._cpu_s()
        requests = list(zip(workload.prompts, workload.lengths, strict=True))
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(json.dumps(requests) + "\n")
        stdin.flush()
        wall_s = float(self._answer())
        cpu_s = self._cpu_s() - before
        self._freeze()
        return Taken(wall_s, cpu_s)

    def __enter__(self) -> SglangServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._processes():
            process.kill()
        self._process.wait()
        self._answers.close()
        self._log.close()

    def _answer(self) -> str:
        line = self._answers.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"SGLang ended:\n{self._log.read()[-4000:]}")
        return line

    def _processes(self) -> list[psutil.Process]:
        worker = psutil.Process(self._process.pid)
        return [worker, *worker.children(recursive=True)]

    def _cpu_s(self) -> float:
        times = self._computing.cpu_times()
        return times.user + times.system

    def _freeze(self) -> None:
        """Its scheduler asks for work all the time, which would disturb who is measured next."""
        for process in self._processes():
            process.suspend()

    def _thaw(self) -> None:
        for process in self._processes():
            process.resume()
