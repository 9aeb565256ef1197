"""A real server in the test process: uvicorn on a free port, an engine on a small model."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import openai

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.hf_architecture import read_trainable_architecture
from npr_megatron.data.tokenizer import load_tokenizer
from npr_megatron.engine.interface import Engine
from npr_megatron.engine.stats import EngineStats
from npr_megatron.pipeline.local_engine import open_engine
from npr_megatron.serving.app import Host, app_of
from npr_megatron.serving.http_thread import HttpThread, listen
from npr_megatron.serving.orders import Served
from npr_megatron.serving.service import Service

QUESTION = "a:1+2?"
DEADLINE_S = 60.0
OpenEngine = Callable[[Path, Served], Engine]


class Live:
    """A server and what stands behind it."""

    def __init__(self, host: Host, http: HttpThread, engine: Engine, served: Served, port: int):
        self.host = host
        self.http = http
        self.engine = engine
        self.served = served
        self.port = port
        self.failed = threading.Event()
        self.service: Service
        self.client = openai.OpenAI(base_url=self.url, api_key="-", max_retries=0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url, api_key="-", max_retries=0)

    def stats(self) -> EngineStats:
        return self.http.call(self.service.look())[0]

    def wait_until_free(self) -> EngineStats:
        """Wait until the engine holds nothing but idle prompts; fail when that takes too long."""
        until = time.monotonic() + DEADLINE_S
        while True:
            stats = self.stats()
            held = (stats.num_running, stats.num_waiting, stats.num_kv_slots_held)
            if held == (0, 0, 0) and self.service.num_open == 0:
                return stats
            assert time.monotonic() < until, stats
            time.sleep(0.01)

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, dict, Any]:
        """Return status, headers and body of a request made by hand; ``body`` may be bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with closing(connection):
            connection.request(method, path, sent)
            response = connection.getresponse()
            content = response.read()
        headers = {name.lower(): value for name, value in response.getheaders()}
        is_json = headers.get("content-type", "").startswith("application/json")
        return response.status, headers, json.loads(content) if is_json else content.decode()


def embedded(folder: Path, served: Served) -> Engine:
    """An engine of the test process."""
    return open_engine(folder, served.engine, served.tokenizer.vocabulary)


@contextmanager
def serving(
    folder: Path,
    *,
    open_with: OpenEngine = embedded,
    max_waiting: int = 512,
    **engine: Any,
) -> Iterator[Live]:
    """Serve the model of ``folder`` as ``npr serve`` does."""
    given = {"debug_checks": True, "kv_after_push": "recompute", **engine}
    config = EngineConfig.model_validate(given)
    served = Served(
        name="speaker",
        model=read_trainable_architecture(folder),
        engine=config,
        tokenizer=load_tokenizer(folder),
    )
    host, listener = Host(), listen("127.0.0.1", 0)
    http_thread = HttpThread(app_of(host), listener)
    http_thread.start()
    own = open_with(folder, served)
    live = Live(host, http_thread, own, served, listener.getsockname()[1])
    capacity = config.max_running + max_waiting
    live.service = http_thread.call(
        host.open(own, served, capacity, lambda error: live.failed.set())
    )
    try:
        yield live
    finally:
        live.client.close()
        live.service.stop(DEADLINE_S)
        http_thread.stop()
        own.close()


def raw_post(port: int, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request on a socket of its own, which the caller reads or closes."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
    size = len(content)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection
