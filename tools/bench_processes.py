"""Processes that a benchmark compares: each works when it is asked and is frozen otherwise."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Have the kernel kill this process with its parent: frozen, it would not see it go."""
    ctypes.CDLL("libc.so.6", use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class FrozenProcess:
    """A Python program that answers each line of JSON with one, and the processes it starts.

    They run while it answers only: SGLang's scheduler asks for work all the time, which would
    disturb who is measured next. Close it by leaving its context.

    Args:
        program: called with ``arguments`` and, last, the number of the descriptor to answer to. Its
            first line says that it is ready.
        environment: variables besides those of this process.
    """

    def __init__(
        self, program: Path, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        answers, other_end = os.pipe()
        self._name = f"{program.name} {' '.join(arguments[:1])}"
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed on exit)
        self._process = subprocess.Popen(
            [sys.executable, str(program), *arguments, str(other_end)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            text=True,
            env={**os.environ, **environment},
            pass_fds=[other_end],
            preexec_fn=_end_with_parent,
        )
        os.close(other_end)
        self._answers = os.fdopen(answers)

    def wait(self) -> None:
        """Wait until it is ready; freeze it."""
        self._answer()
        for process in self.processes():
            process.suspend()

    def ask(self, question: object) -> Any:
        """Return what it answers; it runs meanwhile."""
        for process in self.processes():
            process.resume()
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(json.dumps(question) + "\n")
        stdin.flush()
        answer = self._answer()
        for process in self.processes():
            process.suspend()
        return answer

    def processes(self) -> list[psutil.Process]:
        """Return the program's process and all below it."""
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]

    def __enter__(self) -> FrozenProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            for process in self.processes():
                process.kill()
        self._process.wait()
        self._answers.close()
        self._log.close()

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"{self._name} ended:\n{self._log.read()[-4000:]}")
        return json.loads(line)
