"""``npr`` in processes of its own that can be killed: forked from one that has imported everything.

A fresh interpreter spends seconds on importing torch. The server reads one JSON object a line
(arguments, where to write, the largest file allowed, the byte to die at) and answers with the
child's exit status (negative: the signal). A child that is to die does so by kill -9 in the middle
of the write that holds the byte.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How one ``npr`` ended."""

    status: int
    output: str
    """What it wrote, stdout and stderr together."""
    peak_bytes: int
    """Memory at its highest, above what importing took; 0 if it was killed."""


class Server:
    """Runs children, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def run(
        self,
        *arguments: object,
        max_file_bytes: int | None = None,
        dies_at_byte: int | None = None,
    ) -> Ended:
        """Run ``npr`` with ``arguments`` to its end."""
        output = self._folder / "output"
        order = {
            "argv": [str(argument) for argument in arguments],
            "output": str(output),
            "max": max_file_bytes,
            "dies_at": dies_at_byte,
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        peak = output.with_suffix(".peak")
        return Ended(status, output.read_text(), int(peak.read_text()) if status >= 0 else 0)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)


def _serve() -> None:
    import rich.progress  # noqa: F401
    import torch

    import npr_megatron.cli.main as cli
    import npr_megatron.weights.checkpoints.conversion  # noqa: F401 - children find it imported

    torch.ones(10).sum()

    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(cli.main, order)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(main, order) -> None:
    if order["max"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["max"], order["max"]))
    if order["dies_at"] is not None:
        os.write = dying_at(order["dies_at"], os.write)
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["npr", *order["argv"]]
    code = 1
    Path("/proc/self/clear_refs").write_text("5")  # forget the parent's highest
    before = _memory("VmRSS")
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        Path(order["output"]).with_suffix(".peak").write_text(str(_memory("VmHWM") - before))
        os._exit(code)


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def dying_at(byte, write):
    """Return ``write`` that kills its process when so many bytes were written in all."""
    left = byte

    def dying(descriptor, data):
        nonlocal left
        done = write(descriptor, memoryview(data)[: max(left, 1)])
        left -= done
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    return dying


if __name__ == "__main__":
    _serve()
