"""The HTTP side: paths, what is asked on them, and what the server is up to.

Clients may ask while the model is being read: they are told to come back, as they are when the
server shuts down.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from npr_megatron.engine.interface import Engine
from npr_megatron.serving.answers import EventStream, Job, unless_hung_up
from npr_megatron.serving.errors import ApiError
from npr_megatron.serving.formats import ChatFormat, CompletionFormat
from npr_megatron.serving.metrics import Metrics, engine_exposition
from npr_megatron.serving.orders import Served, order_of
from npr_megatron.serving.service import Service, engine_failed
from npr_megatron.serving.wire import AnyAsked, ChatAsked, CompletionAsked, read_body

MAX_BODY_BYTES = 8 << 20
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_PATHS = (_CHAT, _COMPLETIONS, "/v1/models", "/health", "/metrics")
_HUNG_UP = 499
"""Status of requests whose client has gone, for the metrics; nobody is sent it."""


class State(StrEnum):
    """What a server is up to."""

    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"
    FAILED = "failed"


class Host:
    """The engine as the paths see it: not there yet, serving, or going."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.is_stopping = False
        self._service: Service | None = None
        self._served: Served | None = None
        self._since = int(time.time())

    async def open(
        self,
        engine: Engine,
        served: Served,
        capacity: int,
        on_failure: Callable[[Exception], None],
    ) -> Service:
        """Begin to serve; arguments as those of :class:`Service`."""
        self._served = served
        self._service = Service(engine, capacity, self.metrics.answer_ended, on_failure)
        return self._service

    @property
    def state(self) -> State:
        """What the server is up to."""
        if self._service is not None and self._service.failure is not None:
            return State.STOPPING if self.is_stopping else State.FAILED
        if self.is_stopping:
            return State.STOPPING
        return State.STARTING if self._service is None else State.SERVING

    def ready(self) -> tuple[Service, Served]:
        """Return what answers are made with.

        Raises:
            ApiError: there is nothing yet, or no longer.
        """
        if self._service is None or self._served is None or self.is_stopping:
            raise ApiError(503, str(self.state), f"the server is {self.state}; ask again later")
        if self._service.failure is not None:
            raise engine_failed(self._service.failure)
        return self._service, self._served

    def models(self) -> list[dict[str, Any]]:
        """Return what ``/v1/models`` lists."""
        _, served = self.ready()
        return [
            {
                "id": served.name,
                "object": "model",
                "created": self._since,
                "owned_by": "npr-megatron",
                "max_model_len": served.model.max_position_embeddings,
            }
        ]


def app_of(host: Host) -> FastAPI:
    """Return the application that serves ``host``."""
    app = FastAPI(title="npr serve", redoc_url=None)
    app.add_middleware(_Counting, metrics=host.metrics)
    app.add_exception_handler(ApiError, _refusal)
    app.add_exception_handler(HTTPException, _no_such_thing)
    app.add_exception_handler(Exception, _internal_error)

    @app.post(_CHAT, openapi_extra=_described(_CHAT, ChatAsked))
    async def chat(request: Request) -> Response:
        return await _answer(host, request, ChatAsked, ChatFormat)

    @app.post(_COMPLETIONS, openapi_extra=_described(_COMPLETIONS, CompletionAsked))
    async def completions(request: Request) -> Response:
        return await _answer(host, request, CompletionAsked, CompletionFormat)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": host.models()})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        for found in host.models():
            if found["id"] == name:
                return JSONResponse(found)
        raise ApiError(404, "model_not_found", f"model {name!r} is not served here")

    @app.get("/health")
    async def health() -> Response:
        status = 200 if host.state is State.SERVING else 503
        return JSONResponse({"status": str(host.state)}, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = host.metrics.exposition()
        if host.state is State.SERVING:
            service, served = host.ready()
            stats, version = await service.look()
            num_slots = served.engine.num_kv_slots * served.engine.sglang.dp_size
            text += engine_exposition(stats, version, num_slots)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return app


async def _answer(
    host: Host,
    request: Request,
    kind: type[AnyAsked],
    form: type[ChatFormat] | type[CompletionFormat],
) -> Response:
    service, served = host.ready()
    try:
        fields = read_body(await _body_of(request))
    except ClientDisconnect:
        return Response(status_code=_HUNG_UP)
    response_id = form.prefix + uuid.uuid4().hex
    order = await asyncio.to_thread(order_of, kind, fields, served, response_id)
    teller = served.tokenizer if order.asked.tells_logprobs else None
    written = form(response_id, served.name, teller)
    job = Job(order, served, service, written, host.metrics.first_text)
    if order.asked.stream:
        await job.submit()
        return EventStream(job.stream(), job.give_up)
    try:
        response = await unless_hung_up(job.submit_and_wait(), request.receive)
    finally:
        job.give_up()
    return Response(status_code=_HUNG_UP) if response is None else JSONResponse(response)


async def _body_of(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(
                400,
                "request_too_large",
                f"the body has more than {MAX_BODY_BYTES} bytes; ask for less at once",
            )
    return bytes(body)


def _described(path: str, kind: type[AnyAsked]) -> dict[str, Any]:
    """Return what ``/docs`` tells of the body of a request."""
    place = f"#/paths/{path.replace('/', '~1')}/post/requestBody/content/application~1json/schema"
    schema = kind.model_json_schema(ref_template=f"{place}/$defs/{{model}}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _refusal(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _no_such_thing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = f"{request.method} {request.url.path}"
    refusal = ApiError(
        error.status_code, "not_found", f"{path}: {error.detail}; there are {', '.join(_PATHS)}"
    )
    return JSONResponse(refusal.body(), refusal.status, headers=error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    """Tell the client; the error itself goes on to the log."""
    del request
    told = ApiError(500, "internal_error", f"the server has failed: {type(error).__name__}")
    return JSONResponse(told.body(), told.status)


class _Counting:
    """Counts every request when its response has ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, is_whole = time.monotonic(), _HUNG_UP, False

        async def note(message: Message) -> None:
            nonlocal status, is_whole
            status = message.get("status", status)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            path = scope["path"] if scope["path"] in _PATHS else "other"
            seconds = time.monotonic() - begun
            self._metrics.request_ended(path, status if is_whole else _HUNG_UP, seconds)
