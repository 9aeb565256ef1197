"""How weights reach SGLang's ranks: the calls of its weight interface, each flag looked at.

Coroutines beside SGLang's ``TokenizerManager``, in the process in which it lives (``host``); what
is pushed and what came of it is the business of ``pushed_weights``, in the process of the engine's
owner. All of them write inside SGLang's weight session (``begin_weight_update`` to
``end_weight_update``) and stamp the version that later tokens carry. After an error the ranks may
hold a mixture: the engine must be closed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npr_megatron.engine.sglang.options import WEIGHT_LOADER
from npr_megatron.engine.sglang.weights.broadcast import Meeting
from npr_megatron.engine.sglang.weights.handover import Order
from npr_megatron.errors import EnvironmentFault

_NEEDED = (
    "begin_weight_update",
    "end_weight_update",
    "update_weights_from_tensor",
    "update_weights_from_distributed",
    "update_weights_from_disk",
    "init_weights_update_group",
    "destroy_weights_update_group",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamping:
    """What becomes of version and cache when weights were written."""

    version: int
    """Which tokens carry from then on."""
    keeps_cache: bool
    """Whether keys and values of the old weights stay. Where they are dropped, SGLang refuses if a
    request is running."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Tensors that are received together."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    """``float32`` or ``bfloat16``."""


async def carry_out(manager: Any, orders: Sequence[Order], stamping: Stamping | None) -> None:
    """Have each rank carry out its order.

    Args:
        orders: one per rank.
        stamping: None where the weights stay as they are.

    Raises:
        EnvironmentFault: SGLang refused.
    """
    sglang = _Sglang.beside(manager)
    async with _session(manager, sglang):
        await _hand_over(manager, sglang, orders, stamping)


async def receive(
    manager: Any,
    meeting: Meeting,
    buckets: Sequence[Bucket],
    orders: Sequence[Order],
    stamping: Stamping,
) -> None:
    """Take what a ``broadcast.Broadcaster`` sends at ``meeting``, then carry out ``orders``.

    Raises:
        EnvironmentFault: SGLang refused.
    """
    sglang = _Sglang.beside(manager)
    async with _session(manager, sglang):
        for bucket in buckets:
            is_last = bucket is buckets[-1]
            request = sglang.requests.UpdateWeightsFromDistributedReqInput(
                names=list(bucket.names),
                dtypes=[bucket.dtype] * len(bucket.names),
                shapes=[list(shape) for shape in bucket.shapes],
                group_name=meeting.name,
                flush_cache=is_last and not stamping.keeps_cache,
                weight_version=str(stamping.version) if is_last else None,
            )
            await _done(manager.update_weights_from_distributed(request), "take a broadcast")
        await _hand_over(manager, sglang, orders, None)


async def read_folder(
    manager: Any, folder: Path, orders: Sequence[Order], stamping: Stamping
) -> None:
    """Have every rank read an HF folder, then carry out ``orders``.

    Raises:
        EnvironmentFault: SGLang refused.
    """
    sglang = _Sglang.beside(manager)
    request = sglang.requests.UpdateWeightFromDiskReqInput(
        model_path=str(folder),
        load_format="safetensors",
        weight_version=str(stamping.version),
        flush_cache=not stamping.keeps_cache,
    )
    await _done(manager.update_weights_from_disk(request), f"read {folder}")
    async with _session(manager, sglang):
        await _hand_over(manager, sglang, orders, None)


async def join(manager: Any, meeting: Meeting, num_ranks: int) -> None:
    """Meet a trainer that broadcasts; returns when all are there.

    Raises:
        EnvironmentFault: the meeting did not come about.
    """
    request = _Sglang.beside(manager).requests.InitWeightsUpdateGroupReqInput(
        master_address=meeting.address,
        master_port=meeting.port,
        rank_offset=1,
        world_size=num_ranks + 1,
        group_name=meeting.name,
        backend=meeting.backend,
    )
    await _done(manager.init_weights_update_group(request), "meet a trainer")


async def leave(manager: Any, meeting: Meeting) -> None:
    """End what :func:`join` began.

    Raises:
        EnvironmentFault: there was no such meeting.
    """
    requests = _Sglang.beside(manager).requests
    request = requests.DestroyWeightsUpdateGroupReqInput(group_name=meeting.name)
    await _done(manager.destroy_weights_update_group(request), "leave a trainer")


@dataclass(frozen=True, slots=True)
class _Sglang:
    """What is used of SGLang here."""

    requests: Any
    """Module of its messages."""
    serialise: Callable[[Any], bytes]

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
        # one handle per rank: memory that torch shares between processes can be taken once
        serialized_named_tensors=[sglang.serialise(order.tensors()) for order in orders],
        load_format=WEIGHT_LOADER,
        flush_cache=stamping is not None and not stamping.keeps_cache,
        weight_version=None if stamping is None else str(stamping.version),
    )
    await _done(manager.update_weights_from_tensor(request), "take weights")


async def _done(call: Awaitable[Sequence[Any]], what: str) -> None:
    """Await a call that answers with a flag and a message; raise the message where it failed."""
    succeeded, message, *_ = await call
    if not succeeded:
        raise EnvironmentFault(f"SGLang was asked to {what} and refused: {message}")
