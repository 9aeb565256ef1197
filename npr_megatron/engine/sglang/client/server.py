"""An SGLang engine in a process of its own (``host``), as its owner handles it.

Everything here runs on one event loop of the owner. The host ends with its owner however that ends;
its own end, or that of a scheduler, reaches the owner as an :class:`EnvironmentFault` that quotes
what SGLang wrote last.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from npr_megatron.engine.sglang.stage import Stage, StageResult
from npr_megatron.engine.sglang.wire import (
    DESCRIPTOR,
    HOST_MODULE,
    Abort,
    Answer,
    Ask,
    Call,
    Failed,
    Ready,
    Returned,
    Start,
    frame,
    receive,
)
from npr_megatron.errors import EngineLost, EnvironmentFault

T = TypeVar("T")

_END_S = 10.0
"""An engine that was told to end is killed after so long."""
_QUOTED_LINES = 30
"""Of what SGLang wrote last."""


class Server:
    """Starts a host, sends it stages and calls, and hears what comes back.

    Args:
        options: keyword arguments of ``sglang.Engine``.
        environment: variables that its processes have besides those of this one.
        log: file for what SGLang writes.
        take: told each piece of each answer: number of the stage, piece.
        fail: told once why the host has ended, unless it was closed.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        environment: Mapping[str, str],
        log: Path,
        take: Callable[[int, StageResult], None],
        fail: Callable[[EnvironmentFault], None],
    ) -> None:
        self._options = dict(options)
        # What SGLang imports warns by the page, and the last lines are to say why it has ended.
        self._environment = {**os.environ, "PYTHONWARNINGS": "ignore", **environment}
        self._log = log
        self._take = take
        self._fail = fail
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._listener: asyncio.Task[None] | None = None
        self._num_calls = 0
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._is_closing = False

    async def start(self, timeout_s: float) -> None:
        """Start SGLang and wait until it serves.

        To be called from a thread that lives as long as the server does: the kernel ends the host
        with the thread that started it.

        Raises:
            EnvironmentFault: it does not come up, in time or at all.
        """
        ours, theirs = socket.socketpair()
        with theirs, self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220 - returns at once
                [sys.executable, "-m", HOST_MODULE],
                env={**self._environment, DESCRIPTOR: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # its whole session is killed with it
            )
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        self._send(Start(self._options))
        try:
            messages = await asyncio.wait_for(_receive_or_none(reader), timeout_s)
        except TimeoutError:
            self.kill()
            raise EnvironmentFault(
                f"SGLang was given {timeout_s} s to start and does not serve yet; raise "
                f"engine.sglang.start_timeout_s or see why.\n{self._last_lines()}"
            ) from None
        if messages is None or isinstance(messages, Failed):
            self.kill()
            cause = messages.reason if isinstance(messages, Failed) else self._last_lines()
            raise EnvironmentFault(f"SGLang was to be started and failed:\n{cause}")
        assert [type(message) for message in messages] == [Ready]
        self._listener = asyncio.ensure_future(self._listen(reader))

    @property
    def pid(self) -> int:
        """Process id of the host."""
        assert self._process is not None, "a server is started first"
        return self._process.pid

    def ask(self, number: int, stage: Stage, interval: int, rank: int | None) -> None:
        """Send a stage.

        Args:
            number: names its answers; used for no other stage.
            interval: tokens per piece of the answer.
            rank: data-parallel rank that must serve it.
        """
        self._send(Ask(number, stage, interval, rank))

    def abort(self, number: int) -> None:
        """End a stage early; its last answer follows all the same."""
        self._send(Abort(number))

    async def call(self, function: Callable[..., Coroutine[Any, Any, T]], *arguments: object) -> T:
        """Run a function of a module beside SGLang's ``TokenizerManager``, its first argument.

        Function, arguments, result and error are pickled.

        Raises:
            EngineLost: the host has ended.
            EnvironmentFault: ``function`` raised an error that is not one of ours; ours are raised
                as they are.
        """
        if self._listener is None or self._listener.done():
            raise EnvironmentFault("SGLang was called and does not run any more; start it anew")
        self._num_calls += 1
        result = self._calls[self._num_calls] = asyncio.get_running_loop().create_future()
        self._send(Call(self._num_calls, function, arguments))
        return await result

    async def close(self) -> None:
        """End SGLang and all its processes; safe to call twice."""
        self._is_closing = True
        if self._writer is not None:
            self._writer.close()  # the host ends when its socket does
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, _END_S)
            self.kill()
        if self._listener is not None:
            await self._listener

    def kill(self) -> None:
        """End the host and every process of its session, whatever they are doing."""
        assert self._process is not None, "a server is started first"
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _send(self, message: object) -> None:
        assert self._writer is not None, "a server is started first"
        self._writer.write(frame(message))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while (messages := await _receive_or_none(reader)) is not None:
            for message in messages:
                self._hear(message)
        if self._is_closing:
            fault = EnvironmentFault("SGLang was called and is being closed")
        else:
            self.kill()
            fault = EngineLost(
                "SGLang has ended while it was needed; what it computed is lost. Start the engine "
                f"anew; it wrote last:\n{self._last_lines()}"
            )
            self._fail(fault)
        for result in self._calls.values():
            if not result.cancelled():
                result.set_exception(fault)
        self._calls.clear()

    def _hear(self, message: object) -> None:
        match message:
            case Answer():
                self._take(message.number, message.result)
            case Returned():
                result = self._calls.pop(message.number)
                if result.cancelled():
                    return
                if message.error is None:
                    result.set_result(message.value)
                else:
                    result.set_exception(message.error)
            case _:
                raise AssertionError(f"no message from a host: {message!r}")

    def _last_lines(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_QUOTED_LINES:]) or "(nothing)"


async def _receive_or_none(reader: asyncio.StreamReader) -> Any:
    """Return the next message, None where the other end is gone."""
    try:
        return await receive(reader)
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return None
