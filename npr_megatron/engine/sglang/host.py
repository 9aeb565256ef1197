"""The process in which SGLang lives: its unmodified ``Engine`` between a socket and its schedulers.

SGLang takes the process it is imported into for its own: it replaces the event loop and the
logging, its children send their parent SIGQUIT when they fail, and shutting down kills every child
of the process. So the engine's owner never imports it; it talks to this process, which ends with
its owner, and whose end, whatever the cause, the owner sees as the end of a socket.

Not imported by anything: ``server`` starts it as a module.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import sys
import traceback
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from sglang.srt.entrypoints.engine import Engine  # pyright: ignore[reportMissingImports]
from sglang.srt.managers.io_struct import (  # pyright: ignore[reportMissingImports]
    GenerateReqInput,
)
from sglang.srt.managers.load_snapshot import (  # pyright: ignore[reportMissingImports]
    shm_path_for,
)

from npr_megatron.engine.sglang.folder import remove_together
from npr_megatron.engine.sglang.stage import Stage, StageResult
from npr_megatron.engine.sglang.wire import (
    DESCRIPTOR,
    Abort,
    Answer,
    Ask,
    Call,
    Failed,
    Ready,
    Returned,
    frame,
    receive,
    receive_first,
)
from npr_megatron.errors import EnvironmentFault, NprError
from npr_megatron.records.trajectory import RouteArray

_PR_SET_PDEATHSIG = 1
_LOOK_S = 1.0
"""Between two looks at the schedulers."""


def main() -> None:
    """Serve the owner until it closes the socket or ends."""
    ctypes.CDLL("libc.so.6", use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = socket.socket(fileno=int(os.environ[DESCRIPTOR]))
    start = receive_first(connection)
    try:
        engine = Engine(**start.options)
    except Exception:  # noqa: BLE001 - told to the owner, who raises it
        connection.sendall(frame(Failed(traceback.format_exc())))
        sys.exit(1)
    shared_memory = Path(shm_path_for(engine.port_args.instance_id))  # of its load, for routers
    remove_together(Path(start.options["model_path"]), shared_memory)
    try:
        engine.loop.run_until_complete(_Host(engine.tokenizer_manager).serve(connection))
    except Exception:  # noqa: BLE001 - the owner quotes the end of the log
        traceback.print_exc()
    engine.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # to take down what was imported takes seconds


async def _end_of_a_scheduler() -> str:
    """Wait until a scheduler has ended; return which.

    SGLang looks after its own children only, and schedulers of data-parallel ranks are children of
    their controller, which does not miss them.
    """
    started = psutil.Process().children(recursive=True)
    schedulers = [process for process in started if "scheduler" in process.name()]
    while True:
        for process in schedulers:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return f"scheduler process {process.pid} has ended"
        await asyncio.sleep(_LOOK_S)


class _Host:
    """Carries messages to SGLang's tokenizer manager and answers back."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._tasks: set[asyncio.Task[None]] = set()
        self._aborted: set[int] = set()
        self._outbox: list[object] = []

    async def serve(self, connection: socket.socket) -> None:
        """Serve until the owner is gone or has closed the engine, or a scheduler is gone."""
        reader, self._writer = await asyncio.open_unix_connection(sock=connection)
        self._tell(Ready())
        listening = asyncio.ensure_future(self._listen(reader))
        watching = asyncio.ensure_future(_end_of_a_scheduler())
        await asyncio.wait({listening, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not listening.done():
            listening.cancel()
            print(watching.result(), file=sys.stderr, flush=True)
        watching.cancel()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                self._obey(await receive(reader))
        except (asyncio.IncompleteReadError, ConnectionResetError):
            return

    def _obey(self, message: object) -> None:
        match message:
            case Ask():
                self._spawn(self._answer(message))
            case Abort():
                self._aborted.add(message.number)
                self._manager.abort_request(rid=_rid(message.number))
            case Call():
                self._spawn(self._call(message))
            case _:
                raise AssertionError(f"no message to a host: {message!r}")

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _tell(self, message: object) -> None:
        """Send a message with all others of this turn of the loop."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    def _flush(self) -> None:
        self._writer.write(frame(self._outbox))
        self._outbox = []

    async def _answer(self, ask: Ask) -> None:
        answers = _Answers(self._manager)
        try:
            if ask.number not in self._aborted:
                async for out in self._manager.generate_request(_request(ask), None):
                    if answers.is_news(out):
                        self._tell(Answer(ask.number, answers.convert(out)))
            if not answers.has_ended:
                self._tell(Answer(ask.number, answers.refusal("aborted before it began")))
        except Exception as error:  # noqa: BLE001 - SGLang refuses requests by raising anything
            self._tell(Answer(ask.number, answers.refusal(f"{type(error).__name__}: {error}")))
        finally:
            self._aborted.discard(ask.number)

    async def _call(self, call: Call) -> None:
        try:
            value = await call.function(self._manager, *call.arguments)
            frame(value)  # an answer that cannot travel would never arrive
        except NprError as error:
            self._tell(Returned(call.number, None, error))
        except Exception:  # noqa: BLE001 - raised to the caller, who may not know its type
            fault = EnvironmentFault(f"SGLang failed at a call:\n{traceback.format_exc()}")
            self._tell(Returned(call.number, None, fault))
        else:
            self._tell(Returned(call.number, value, None))


def _routes(meta: dict[str, Any]) -> RouteArray | None:
    """Return the experts of a request that has ended, in one row; None where none are told."""
    found = meta.get("routed_experts")
    return None if found is None else np.frombuffer(b64decode(found), np.int32).astype(np.int16)


def _rid(number: int) -> str:
    """SGLang aborts every request whose name begins with the one given: all are of one length."""
    return f"npr-{number:016x}"


def _request(ask: Ask) -> GenerateReqInput:
    stage: Stage = ask.stage
    routes: dict[str, Any] = {}
    if stage.routes_from is not None:
        routes = {
            "return_routed_experts": True,
            "routed_experts_start_len": stage.routes_from,
        }
    return GenerateReqInput(
        rid=_rid(ask.number),
        input_ids=stage.token_ids,
        sampling_params={
            "max_new_tokens": stage.max_new_tokens,
            "stop_token_ids": list(stage.stop_ids),
            "stream_interval": ask.interval,
            "custom_params": stage.custom_params(),
        },
        return_logprob=True,
        logprob_start_len=-1 if stage.score_from is None else stage.score_from,
        cache_salt=stage.namespace,
        routed_dp_rank=ask.rank,
        stream=True,
        **routes,
    )


class _Answers:
    """Turns the pieces of one request into results."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._num_told = 0
        self._has_begun = False
        self.has_ended = False

    def is_news(self, out: dict[str, Any]) -> bool:
        """Return whether ``out`` adds anything to the pieces before it.

        SGLang also tells of a request that it retracts, before its first token even: then not even
        the log-probs of known tokens are there yet.
        """
        meta = out["meta_info"]
        return meta["finish_reason"] is not None or meta["completion_tokens"] > self._num_told

    def convert(self, out: dict[str, Any]) -> StageResult:
        """Return what ``out`` adds to the pieces before it."""
        meta = out["meta_info"]
        reason = meta["finish_reason"]
        start, stop = self._num_told, meta["completion_tokens"]
        num_new = stop - start
        self._num_told, self.has_ended = stop, reason is not None
        scored: list[float] = []
        if not self._has_begun:
            # Nothing predicts the first one: it has no log-prob.
            scored = [logprob for logprob, *_ in meta.get("input_token_logprobs", ())[1:]]
            self._has_begun = True
        # A request that is aborted tells its last token a second time.
        token_ids = out["output_ids"][-num_new:] if num_new else []
        logprobs = meta.get("output_token_logprobs", ())[-num_new:] if num_new else []
        refusal = ""
        if reason is not None and reason["type"] == "abort":
            refusal = reason["message"] or "aborted"
        return StageResult(
            token_ids=list(token_ids),
            logprobs=[logprob for logprob, *_ in logprobs],
            weight_versions=self._versions(meta, start, stop),
            scored=scored,
            scored_version=self._live_version,
            num_cached=meta.get("cached_tokens", 0),
            is_last=self.has_ended,
            routes=_routes(meta) if self.has_ended else None,
            refusal=refusal,
        )

    def refusal(self, why: str) -> StageResult:
        """Return the last answer of a request that SGLang did not take."""
        return StageResult(
            token_ids=[],
            logprobs=[],
            weight_versions=[],
            scored=[],
            scored_version=self._live_version,
            num_cached=0,
            is_last=True,
            refusal=why,
        )

    @property
    def _live_version(self) -> int:
        return int(self._manager.config_value("weight_version"))

    def _versions(self, meta: dict[str, Any], start: int, stop: int) -> list[int]:
        """Return the weight version of each of the tokens ``start`` to ``stop``.

        SGLang says where versions changed when a request ends; before, what it tells was sampled
        under the weights that are live.
        """
        versions = [self._live_version] * (stop - start)
        for span in meta.get("weight_versions", ()):
            for index in range(max(span["start"], start), min(span["end"], stop)):
                versions[index - start] = int(span["version"])
        return versions


if __name__ == "__main__":
    main()
