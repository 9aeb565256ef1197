"""SGLang as the other engine of tools/bench_engine.py.

Stock sequential decoding by SGLang: ids in and out, continuous batching, radix cache, one computing
thread on a core of its own. tools/setup_sglang installs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from bench_engine_workload import Workload
from bench_processes import FrozenProcess

_WORKER = Path(__file__).with_name("sglang_worker.py")
STOCK = {"SGLANG_PLUGINS": "npr_torch_cpu"}
"""Variables under which SGLang is as its authors made it, but for the platform that CPUs need."""


class Taken(NamedTuple):
    """What a run cost."""

    wall_s: float
    cpu_s: float
    """Of the process that computes."""


class SglangServer(FrozenProcess):
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
        threads = {"SGLANG_CPU_OMP_THREADS_BIND": str(core), "OMP_NUM_THREADS": "1"}
        super().__init__(_WORKER, [json.dumps(options)], STOCK | threads)
        self.wait()
        (self._computing,) = (
            process for process in self.processes() if "scheduler" in process.cmdline()[0]
        )

    def serve(self, workload: Workload) -> Taken:
        """Return what it took to sample every response."""
        before = self._cpu_s()
        wall_s = self.ask(list(zip(workload.prompts, workload.lengths, strict=True)))
        return Taken(wall_s, self._cpu_s() - before)

    def _cpu_s(self) -> float:
        times = self._computing.cpu_times()
        return times.user + times.system
