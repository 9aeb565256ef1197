"""An HTTP server in a thread of its own, so that the main one can open and close an engine."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI

from npr_megatron.errors import EnvironmentFault

Result = TypeVar("Result")
_CLOSING_S = 5
"""How long responses may still be written once the server ends."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; clients wait in its queue until it is served.

    Raises:
        EnvironmentFault: the address cannot be used.
    """
    try:
        return socket.create_server((host, port), backlog=2048)
    except (OSError, OverflowError) as error:
        raise EnvironmentFault(
            f"the server was to listen on {host}:{port}: {error}; choose another --host or --port"
        ) from error


class HttpThread:
    """Serves ``app`` on ``listener`` until it is stopped.

    Args:
        on_end: called by the thread when it has ended, whatever the reason.
    """

    def __init__(
        self, app: FastAPI, listener: socket.socket, on_end: Callable[[], None] = lambda: None
    ) -> None:
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_CLOSING_S,
        )
        self._server = uvicorn.Server(config)
        self._listener = listener
        self._on_end = on_end
        self._is_up = threading.Event()
        self._coroutines: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self.failure: BaseException | None = None
        """What ended the thread before its time."""

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()
        self._is_up.wait()

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run ``work`` among the requests and return what it returns."""
        assert self._coroutines is not None
        return asyncio.run_coroutine_threadsafe(work, self._coroutines).result()

    def stop(self) -> None:
        """Stop listening, finish the responses under way, end; safe to call twice."""
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - kept for the main thread
            self.failure = error
        finally:
            self._is_up.set()
            self._on_end()

    async def _serve(self) -> None:
        self._coroutines = asyncio.get_running_loop()
        self._is_up.set()
        await self._server.serve(sockets=[self._listener])
