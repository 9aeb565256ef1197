"""What passes between an engine and the process in which its SGLang lives: pickled frames.

Both ends are ours and run the same code; nobody else reaches the socket.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import struct
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from npr_megatron.engine.sglang.stage import Stage, StageResult

_LENGTH = struct.Struct("<Q")
HOST_MODULE = "npr_megatron.engine.sglang.host"
DESCRIPTOR = "NPR_SGLANG_SOCKET"
"""Variable that tells the host the number of its socket."""


@dataclass(frozen=True, slots=True)
class Start:
    """First to the host: the options of ``sglang.Engine``."""

    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """A stage to carry out."""

    number: int
    stage: Stage
    interval: int
    """Tokens per piece of the answer."""
    rank: int | None
    """Data-parallel rank that must serve it; None where there is one."""


@dataclass(frozen=True, slots=True)
class Abort:
    """End a stage early; its last answer follows all the same."""

    number: int


@dataclass(frozen=True, slots=True)
class Call:
    """A coroutine function to run beside SGLang's tokenizer manager, its first argument."""

    number: int
    function: Callable[..., Coroutine[Any, Any, Any]]
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """First from the host: SGLang serves."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Instead of :class:`Ready`: why it does not."""

    reason: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A piece of a stage's answer."""

    number: int
    result: StageResult


@dataclass(frozen=True, slots=True)
class Returned:
    """What a call returned, or the error it raised."""

    number: int
    value: Any
    error: BaseException | None


def frame(message: object) -> bytes:
    """Return a message as it goes over the wire."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


def receive_first(connection: socket.socket) -> Any:
    """Return the first message, waiting for it; reads nothing of a second one."""
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    return pickle.loads(_read(connection, length))


def _read(connection: socket.socket, num_bytes: int) -> bytes:
    found = b""
    while len(found) < num_bytes:
        piece = connection.recv(num_bytes - len(found))
        if not piece:
            raise EOFError("the owner of this host is gone")
        found += piece
    return found


async def receive(reader: asyncio.StreamReader) -> Any:
    """Return the next message; raise ``IncompleteReadError`` when the other end is gone."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return pickle.loads(await reader.readexactly(length))
