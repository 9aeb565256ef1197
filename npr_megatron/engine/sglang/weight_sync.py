"""How weights reach the ranks of an SGLang engine, by every way that SGLang has.

All of them run inside SGLang's weight session (``begin_weight_update`` to ``end_weight_update``),
stamp the version that later tokens carry, and look at every flag that comes back. After an error
here the ranks may hold a mixture: close the engine.

* :meth:`push`: the host's shadow, or what a trainer of this node published, in shared memory or in
  the memory of a GPU. Ranks check digests themselves (``loader``).
* :meth:`receive`: tensors that a trainer broadcasts over gloo or NCCL (``broadcast``).
* :meth:`load_folder`: an HF folder, which every rank reads.

Behind the last two the ranks write what they hold into the host's shadow, and its digest must be
the one that the publisher told: SGLang itself would not notice a parameter that was left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.engine.sglang.broadcast import Meeting, buckets_of
from npr_megatron.engine.sglang.handover import Means, Order, Reports
from npr_megatron.engine.sglang.host_weights import HostWeights, Offer
from npr_megatron.engine.sglang.options import WEIGHT_LOADER
from npr_megatron.errors import EnvironmentFault, LayoutError, StaleWeightsError
from npr_megatron.weights.checkpoints.hf import read_hf
from npr_megatron.weights.digest import digest_box
from npr_megatron.weights.layouts import canonical_layout
from npr_megatron.weights.publication import Publication

_NEEDED = (
    "begin_weight_update",
    "end_weight_update",
    "update_weights_from_tensor",
    "update_weights_from_distributed",
    "update_weights_from_disk",
    "init_weights_update_group",
    "destroy_weights_update_group",
)


@dataclass(frozen=True, slots=True)
class _Sglang:
    """The names of SGLang that are used here, looked up once."""

    requests: Any
    """Module of the messages."""
    serialise: Callable[[Any], bytes]

    @classmethod
    def found(cls, manager: Any) -> _Sglang:
        """Look them up.

        Raises:
            EnvironmentFault: this version of SGLang lacks some of them.
        """
        try:
            from sglang.srt.managers import (  # pyright: ignore[reportMissingImports]
                io_struct,
            )
            from sglang.srt.utils import (  # pyright: ignore[reportMissingImports]
                MultiprocessingSerializer,
            )
        except ImportError as error:
            raise EnvironmentFault(f"SGLang cannot be imported ({error}); install it") from error
        if missing := [name for name in _NEEDED if not hasattr(manager, name)]:
            raise EnvironmentFault(
                f"this version of SGLang has no {', '.join(missing)}, and weights are pushed by "
                "them; install one between 0.5.22 and 0.5.23"
            )
        return cls(io_struct, MultiprocessingSerializer.serialize)


class WeightSync:
    """The weights of one running engine.

    Its coroutines run on the event loop of SGLang's ``TokenizerManager``, one at a time.

    Args:
        manager: SGLang's ``TokenizerManager``.
        host: the host's copies of the weights.
    """

    def __init__(self, manager: Any, model: ModelConfig, tp_size: int, host: HostWeights) -> None:
        self._manager, self._model, self._tp_size, self._host = manager, model, tp_size, host
        self._sglang = _Sglang.found(manager)
        self._reports = Reports(tp_size)
        self._serial = 0

    async def require_layout(self) -> None:
        """Require SGLang to hold the model as our layout declares.

        Raises:
            LayoutError: names, shapes or dtypes differ; lists every difference.
        """
        async with _Session(self._manager, self._sglang.requests):
            await self._order(lambda _: {})

    async def push(self, version: int, *, keeps_cache: bool) -> None:
        """Have the ranks take the host's shadow, and serve it as ``version``.

        Args:
            keeps_cache: whether keys and values of the old weights stay. Where they are dropped,
                no request may be running.

        Raises:
            StaleWeightsError: nothing was staged.
            DivergenceError: what was staged holds NaN or infinity. Nothing has changed then.
            LayoutError: SGLang holds the model otherwise than declared.
            EnvironmentFault: SGLang refused.
        """
        offer = self._host.offer(version)
        async with _Session(self._manager, self._sglang.requests):
            await self._order(
                lambda rank: _taking(offer, rank), version=version, keeps_cache=keeps_cache
            )
        self._host.swap(version)

    async def pull(
        self,
        publication: Publication,
        source: ParallelConfig,
        *,
        means: Means,
        keeps_cache: bool,
    ) -> None:
        """Have the ranks take a trainer's publication straight from its memory.

        Args:
            source: how the trainer that published is laid out.

        Raises:
            StaleWeightsError: the ranks do not hold what was published; close the engine.
            EnvironmentFault: SGLang refused.
        """
        fields = {"publication": publication, "source": source, "means": means}
        async with _Session(self._manager, self._sglang.requests):
            await self._order(
                lambda _: fields, version=publication.version, keeps_cache=keeps_cache
            )
            await self._bring_back(publication.version, publication.digest)

    async def receive(
        self, meeting: Meeting, version: int, digest: int, *, keeps_cache: bool
    ) -> None:
        """Take the tensors that a ``broadcast.Broadcaster`` sends at ``meeting``.

        Args:
            digest: of the weights, as the sender computed it.

        Raises:
            StaleWeightsError: what arrived is not what was sent; close the engine.
            EnvironmentFault: SGLang refused.
        """
        requests, manager = self._sglang.requests, self._manager
        buckets = buckets_of(self._model, meeting.bucket_bytes, self._host.dtype)
        async with _Session(manager, requests):
            for number, bucket in enumerate(buckets):
                is_last = number == len(buckets) - 1
                request = requests.UpdateWeightsFromDistributedReqInput(
                    names=[parameter.name for parameter in bucket],
                    dtypes=[str(self._host.dtype).removeprefix("torch.")] * len(bucket),
                    shapes=[list(parameter.shape) for parameter in bucket],
                    group_name=meeting.name,
                    flush_cache=is_last and not keeps_cache,
                    weight_version=str(version) if is_last else None,
                )
                await _done(manager.update_weights_from_distributed(request), "taking a broadcast")
            await self._bring_back(version, digest)

    async def join(self, meeting: Meeting) -> None:
        """Meet a trainer that broadcasts; returns when all are there.

        Raises:
            EnvironmentFault: the meeting did not come about.
        """
        request = self._sglang.requests.InitWeightsUpdateGroupReqInput(
            master_address=meeting.address,
            master_port=meeting.port,
            rank_offset=1,
            world_size=self._tp_size + 1,
            group_name=meeting.name,
            backend=meeting.backend,
        )
        await _done(self._manager.init_weights_update_group(request), "meeting a trainer")

    async def leave(self, meeting: Meeting) -> None:
        """End what :meth:`join` began.

        Raises:
            EnvironmentFault: there was no such meeting.
        """
        request = self._sglang.requests.DestroyWeightsUpdateGroupReqInput(group_name=meeting.name)
        await _done(self._manager.destroy_weights_update_group(request), "leaving a trainer")

    async def load_folder(self, folder: Path, version: int, *, keeps_cache: bool) -> None:
        """Have every rank read an HF folder.

        Raises:
            StaleWeightsError: the ranks do not hold what is in the folder; close the engine.
            InputError: the folder does not hold this model; nothing has changed then.
            EnvironmentFault: SGLang refused.
        """
        request = self._sglang.requests.UpdateWeightFromDiskReqInput(
            model_path=str(folder),
            load_format="safetensors",
            weight_version=str(version),
            flush_cache=not keeps_cache,
        )
        digest = await asyncio.to_thread(_folder_digest, self._model, folder, self._host.dtype)
        await _done(self._manager.update_weights_from_disk(request), f"reading {folder}")
        async with _Session(self._manager, self._sglang.requests):
            await self._bring_back(version, digest)

    def close(self) -> None:
        """Let go of shared memory; safe to call twice."""
        self._reports.close()

    async def _bring_back(self, version: int, digest: int) -> None:
        """Have the ranks fill the host's shadow, and serve it if it is what was published."""
        self._host.staging()
        await self._order(
            lambda _: {
                "into": self._host.path,
                "slot": self._host.shadow,
                "dtype": str(self._host.dtype),
            }
        )
        self._host.seal()
        offer = self._host.offer(version)
        if offer.publication.digest != digest:
            raise StaleWeightsError(
                f"SGLang took version {version} and holds digest {offer.publication.digest:#018x}, "
                f"published was {digest:#018x}; it must not serve them: close the engine"
            )
        self._host.swap(version)

    async def _order(
        self,
        fields: Callable[[int], dict[str, Any]],
        *,
        version: int | None = None,
        keeps_cache: bool = True,
    ) -> None:
        """Give each rank an order with ``fields(rank)``; raise what ranks have against it."""
        self._serial += 1
        orders = [
            Order(
                serial=self._serial,
                model=self._model,
                rank=rank,
                tp_size=self._tp_size,
                reports=self._reports.path,
                **fields(rank),
            ).tensors()
            for rank in range(self._tp_size)
        ]
        request = self._sglang.requests.UpdateWeightsFromTensorReqInput(
            # one handle per rank: memory that torch shares between processes is taken once
            serialized_named_tensors=[self._sglang.serialise(order) for order in orders],
            load_format=WEIGHT_LOADER,
            flush_cache=not keeps_cache,
            weight_version=None if version is None else str(version),
        )
        await _done(self._manager.update_weights_from_tensor(request), "taking weights")
        if problems := self._reports.problems(self._serial):
            raise LayoutError("\n".join(problems))


class _Session:
    """SGLang's weight session; left open by an error, since the engine is to be closed then."""

    def __init__(self, manager: Any, requests: Any) -> None:
        self._manager, self._requests = manager, requests

    async def __aenter__(self) -> None:
        await _done(
            self._manager.begin_weight_update(self._requests.BeginWeightUpdateReqInput()),
            "opening a weight session",
        )

    async def __aexit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            await _done(
                self._manager.end_weight_update(self._requests.EndWeightUpdateReqInput()),
                "closing a weight session",
            )


def _taking(offer: Offer, rank: int) -> dict[str, Any]:
    return {"publication": offer.publication, "shares": offer.shares[rank]}


def _folder_digest(model: ModelConfig, folder: Path, dtype: torch.dtype) -> int:
    """Return the digest of an HF folder in ``dtype``, read parameter by parameter."""
    read = read_hf(folder, model).read
    [rank] = canonical_layout(model).ranks
    total = sum(
        digest_box(tile.parameter, tile.box, read(tile.parameter, tile.box).to(dtype))
        for tile in rank.tiles
    )
    return total % 2**64


async def _done(call: Coroutine[Any, Any, Sequence[Any]], what: str) -> None:
    """Await a call that answers with a flag and a message; raise the message where it failed."""
    succeeded, message, *_ = await call
    if not succeeded:
        raise EnvironmentFault(
            f"SGLang was asked for {what} and refused: {message}; close the engine"
        )
