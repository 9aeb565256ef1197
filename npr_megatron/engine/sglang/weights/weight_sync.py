"""How weights reach SGLang's ranks: the calls of its weight interface, each flag looked at.

Coroutines beside SGLang's ``TokenizerManager``, in the process in which it lives (``host``); what
is pushed and what came of it is the business of ``pushed_weights``, in the process of the engine's
owner. Ranks write inside SGLang's weight session (``begin_weight_update`` to ``end_weight_update``)
and stamp the version that later tokens carry. After an error they may hold a mixture: the engine
must be closed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from npr_megatron.engine.sglang.options import WEIGHT_LOADER
from npr_megatron.engine.sglang.weights.handover import Order
from npr_megatron.errors import EnvironmentFault

_NEEDED = (
    "begin_weight_update",
    "end_weight_update",
    "update_weights_from_tensor_communicator",
    "update_weight_version",
    "model_update_lock",
    "is_pause_cond",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamping:
    """What becomes of version and cache when weights were written."""

    version: int
    """Which tokens carry from then on."""
    keeps_cache: bool
    """Whether keys and values of the old weights stay. Where they are dropped, SGLang refuses if a
    request is running."""


async def carry_out(manager: Any, orders: Sequence[Order], stamping: Stamping | None) -> None:
    """Have each rank carry out its order.

    Args:
        orders: one per tensor-parallel rank.
        stamping: None where the weights stay as they are.

    Raises:
        EnvironmentFault: SGLang refused.
    """
    sglang = _Sglang.beside(manager)
    async with _session(manager, sglang):
        await _hand_over(manager, sglang, orders, stamping)


@dataclass(frozen=True, slots=True)
class _Sglang:
    """What is used of SGLang here."""

    requests: Any
    """Module of its messages."""
    serialise: Callable[[Any], Any]

    @classmethod
    def beside(cls, manager: Any) -> _Sglang:
        """Look it up.

        Raises:
            EnvironmentFault: this version of SGLang lacks something.
        """
        from sglang.srt.managers import io_struct  # pyright: ignore[reportMissingImports]
        from sglang.srt.utils import (  # pyright: ignore[reportMissingImports]
            MultiprocessingSerializer,
        )

        if missing := [name for name in _NEEDED if not hasattr(manager, name)]:
            raise EnvironmentFault(
                f"weights are pushed by {', '.join(missing)}, and this SGLang has nothing of the "
                "name; install a supported version"
            )
        return cls(io_struct, MultiprocessingSerializer.serialize)


@asynccontextmanager
async def _session(manager: Any, sglang: _Sglang) -> AsyncIterator[None]:
    """Hold a weight session; it stays open behind an error, when the engine is closed anyway."""
    requests = sglang.requests
    await _done(manager.begin_weight_update(requests.BeginWeightUpdateReqInput()), "open a session")
    yield
    await _done(manager.end_weight_update(requests.EndWeightUpdateReqInput()), "close a session")


async def _hand_over(
    manager: Any, sglang: _Sglang, orders: Sequence[Order], stamping: Stamping | None
) -> None:
    request = sglang.requests.UpdateWeightsFromTensorReqInput(
        serialized_named_tensors=[sglang.serialise(order.tensors()) for order in orders],
        load_format=WEIGHT_LOADER,
        flush_cache=stamping is not None and not stamping.keeps_cache,
        weight_version=None if stamping is None else str(stamping.version),
    )
    for answer in await _to_all(manager, request):
        _require(answer.success, answer.message, "take weights")
    if stamping is not None:
        version = sglang.requests.UpdateWeightVersionReqInput(
            new_version=str(stamping.version), abort_all_requests=False
        )
        await manager.update_weight_version(version)


async def _to_all(manager: Any, request: Any) -> Sequence[Any]:
    """Return what each data-parallel rank answers to an update by tensors.

    SGLang's method for it refuses more than one of them, since shared tensors can be taken once.
    Ours hold nothing: the request goes the way that the method takes, under the same locks.
    """
    ask = manager.update_weights_from_tensor_communicator
    async with manager.is_pause_cond:
        if manager.is_pause:  # whoever paused holds the lock below
            return await ask(request)
    async with manager.model_update_lock.writer_lock:
        return await ask(request)


async def _done(call: Awaitable[Sequence[Any]], what: str) -> None:
    """Await a call that answers with a flag and a message; raise the message where it failed."""
    succeeded, message, *_ = await call
    _require(succeeded, message, what)


def _require(succeeded: bool, message: str, what: str) -> None:
    if not succeeded:
        raise EnvironmentFault(f"SGLang was asked to {what} and refused: {message}")
