"""``npr serve`` from the first look at the model to the last answer.

The main thread opens the engine, waits, and closes it; HTTP has a thread of its own, so that
clients are told what is going on while the model is read. On Ctrl-C or SIGTERM nothing new is
taken, answers under way may go on for a while, and what is left is ended with an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from npr_megatron.config.hf_architecture import read_trainable_architecture
from npr_megatron.data.tokenizer import load_tokenizer
from npr_megatron.engine.interface import Engine
from npr_megatron.errors import EnvironmentFault
from npr_megatron.pipeline.generate import find_device, is_cuda
from npr_megatron.pipeline.local_engine import local_engine, speaks
from npr_megatron.serving.app import Host, app_of
from npr_megatron.serving.http_thread import HttpThread, listen
from npr_megatron.serving.orders import Served
from npr_megatron.serving.serve_order import ServeOrder
from npr_megatron.serving.service import Service

_ABORT_S = 10.0
"""How long an engine may take to hand back what it is told to end."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An order that was looked at: the model can be served on this machine."""

    order: ServeOrder
    served: Served
    device: torch.device | None


def prepare(order: ServeOrder, *, is_dtype_open: bool) -> Prepared:
    """Look at model, tokenizer and device; read no weights.

    Args:
        is_dtype_open: take bf16 on CUDA and fp32 elsewhere.

    Raises:
        InputError: no usable model or tokenizer in the folder, or no such device.
        EnvironmentFault: this machine does not have the device.
    """
    model = read_trainable_architecture(order.model_folder)
    device = find_device(order.device)
    engine = order.engine
    if is_dtype_open and is_cuda(device):
        engine = engine.model_copy(update={"dtype": "bf16"})
    tokenizer = load_tokenizer(order.model_folder, max_plans=engine.max_plans)
    served = Served(name=order.name, model=model, engine=engine, tokenizer=tokenizer)
    return Prepared(replace(order, engine=engine), served, device)


def serve(prepared: Prepared, say: Callable[[str], None]) -> None:
    """Serve until interrupted.

    Args:
        say: told where the server can be reached, once it can.

    Raises:
        KeyboardInterrupt: as was asked; everything is closed.
        EnvironmentFault: the address cannot be used, or a thread does not end.
        Exception: whatever ended the engine.
    """
    order, served = prepared.order, prepared.served
    vocabulary = served.tokenizer.vocabulary
    arguments = (order.model_folder, served.engine, vocabulary)
    if not speaks():
        with local_engine(*arguments, device=prepared.device):
            return
    host, ended = Host(), threading.Event()
    http = HttpThread(app_of(host), listener := listen(order.host, order.port), ended.set)
    address = f"http://{order.host}:{listener.getsockname()[1]}"
    say(f"reading {order.model_folder}; {address}/health tells when it is there")
    http.start()
    try:
        with local_engine(*arguments, device=prepared.device) as engine:
            assert engine is not None
            _serve_with(engine, prepared, host, http, ended, lambda: say(f"serving {address}/v1"))
    finally:
        host.is_stopping = True
        http.stop()


def _serve_with(
    engine: Engine,
    prepared: Prepared,
    host: Host,
    http: HttpThread,
    ended: threading.Event,
    on_ready: Callable[[], None],
) -> None:
    order = prepared.order
    capacity = order.engine.max_running + order.max_waiting
    opening = host.open(engine, prepared.served, capacity, lambda error: ended.set())
    service = http.call(opening)
    try:
        on_ready()
        ended.wait()
        if service.failure is not None:
            raise service.failure
        raise EnvironmentFault(f"the HTTP server has ended: {http.failure}") from http.failure
    except KeyboardInterrupt:
        host.is_stopping = True
        http.call(_drain(service, order.drain_s))
        raise
    finally:
        service.stop(_ABORT_S)


async def _drain(service: Service, drain_s: float) -> None:
    """Let answers end by themselves for a while; end the others."""
    if not await service.wait_idle(drain_s):
        service.release_all()
        await service.wait_idle(_ABORT_S)
