"""The weights of an SGLang engine, as its owner sees them: what is served, staged and pushed.

Ways in, all of which end in the same state (the ranks hold a version, the host's copy is that
version, later tokens are stamped with it):

* :meth:`PushedWeights.commit`: from the host's shadow; ranks cut their parts out of it. The way of
  fleets, whose replicas stage what was published while they decode.
* :meth:`PushedWeights.pull`: from what a trainer of this node published, in shared memory or, with
  CUDA, in the memory of a GPU.
* :meth:`PushedWeights.receive`: from a trainer that broadcasts over gloo or NCCL.
* :meth:`PushedWeights.read_folder`: from an HF folder.

Behind the last three the ranks write what they hold into the host's shadow, and its digest must be
the one that was announced: SGLang itself does not notice a parameter that was left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.engine.sglang.weights import weight_sync
from npr_megatron.engine.sglang.weights.broadcast import Meeting, buckets_of
from npr_megatron.engine.sglang.weights.handover import Means, Order, Reports
from npr_megatron.engine.sglang.weights.host_weights import HostWeights
from npr_megatron.engine.sglang.weights.weight_sync import Bucket, Stamping
from npr_megatron.errors import EngineLost, LayoutError, StaleWeightsError
from npr_megatron.weights.checkpoints.hf import read_hf
from npr_megatron.weights.digest import digest_box
from npr_megatron.weights.layouts import canonical_layout
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.storages import DTYPES

RunBeside = Callable[..., Any]
"""Runs a coroutine function of ``weight_sync`` beside SGLang's tokenizer manager, with the
arguments behind it, and returns or raises what it does."""


class PushedWeights:
    """The weights of one engine.

    After an error of ``commit``, ``pull``, ``receive`` or ``read_folder`` other than those that say
    that nothing has changed, the ranks may hold a mixture: close the engine.

    Args:
        run: how the process of the engine is reached.

    Raises:
        EnvironmentFault: not enough memory for two copies of the model.
    """

    def __init__(self, model: ModelConfig, config: EngineConfig, run: RunBeside) -> None:
        self._model, self._tp_size, self._run = model, config.tp_size, run
        self._dtype = DTYPES[config.dtype]
        self._host = HostWeights(model, self._dtype, config.tp_size)
        self._reports = Reports(config.tp_size)
        self._serial = 0

    @property
    def served(self) -> Mapping[str, Tensor]:
        """Served storages by name; read only."""
        return self._host.served

    @property
    def version(self) -> int:
        """Of the served weights; -1 until some are pushed."""
        return self._host.version

    def require_layout(self) -> None:
        """Require SGLang to hold the model as our layout declares.

        Raises:
            LayoutError: names, shapes or dtypes differ; lists every difference.
        """
        self._carry_out(self._orders(), None)

    def staging(self) -> dict[str, Tensor]:
        """Return the shadow storages, to be filled anew."""
        return self._host.staging()

    def stage(self, weights: Mapping[str, Tensor]) -> None:
        """Fill the shadow with ``weights`` and seal it.

        Raises:
            LayoutError: a storage is missing, unknown or of another shape.
            DivergenceError: a storage holds NaN or infinity.
        """
        self._host.stage(weights)

    def seal(self) -> None:
        """Check and digest the shadow, so that :meth:`commit` need not.

        Raises:
            DivergenceError: a storage holds NaN or infinity.
        """
        self._host.seal()

    def prepare(self, version: int) -> None:
        """Raise what keeps the shadow from becoming ``version``, before anything is stopped for it.

        Raises:
            StaleWeightsError: nothing was staged.
            DivergenceError: a storage holds NaN or infinity.
        """
        self._host.require_sealed(version)

    def commit(self, version: int, *, keeps_cache: bool) -> None:
        """Have the ranks take the shadow, and serve it as ``version``.

        Args:
            keeps_cache: whether keys and values of the old weights stay. Where they are dropped, no
                request may be running.

        Raises:
            StaleWeightsError: nothing was staged. Nothing has changed then.
            DivergenceError: what was staged holds NaN or infinity. Nothing has changed then.
            EnvironmentFault: SGLang refused.
            EngineLost: its process ended: a rank that does not hold what it was given ends it.
        """
        offer = self._host.offer(version)
        orders = [
            replace(order, publication=offer.publication, shares=shares)
            for order, shares in zip(self._orders(), offer.shares, strict=True)
        ]
        self._carry_out(orders, Stamping(version=version, keeps_cache=keeps_cache))
        self._host.swap(version)

    def pull(
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
            StaleWeightsError: the ranks do not hold what was published.
            EnvironmentFault: SGLang refused.
            EngineLost: its process ended.
        """
        orders = [
            replace(order, publication=publication, source=source, means=means)
            for order in self._orders()
        ]
        stamping = Stamping(version=publication.version, keeps_cache=keeps_cache)
        self._carry_out(orders, stamping)
        self._carry_out(self._bringing(), None)
        self._serve_if(publication.version, publication.digest)

    def join(self, meeting: Meeting) -> None:
        """Meet a trainer that broadcasts; returns when all are there.

        Raises:
            EnvironmentFault: the meeting did not come about. Nothing has changed then.
        """
        self._run(weight_sync.join, meeting, self._tp_size)

    def receive(self, meeting: Meeting, version: int, digest: int, *, keeps_cache: bool) -> None:
        """Take the tensors that a ``broadcast.Broadcaster`` sends at ``meeting``.

        Args:
            digest: of the weights, as the sender computed it.

        Raises:
            StaleWeightsError: what arrived is not what was sent.
            EnvironmentFault: SGLang refused.
            EngineLost: its process ended.
        """
        buckets = [
            Bucket(
                names=tuple(parameter.name for parameter in bucket),
                shapes=tuple(parameter.shape for parameter in bucket),
                dtype=str(self._dtype).removeprefix("torch."),
            )
            for bucket in buckets_of(self._model, meeting.bucket_bytes, self._dtype)
        ]
        orders, stamping = self._bringing(), Stamping(version=version, keeps_cache=keeps_cache)
        self._answered(weight_sync.receive, meeting, buckets, orders, stamping)
        self._serve_if(version, digest)

    def leave(self, meeting: Meeting) -> None:
        """End what :meth:`join` began.

        Raises:
            EnvironmentFault: there was no such meeting.
        """
        self._run(weight_sync.leave, meeting)

    def read_folder(self, folder: Path, version: int, *, keeps_cache: bool) -> None:
        """Have every rank read an HF folder.

        Raises:
            InputError: the folder does not hold this model. Nothing has changed then.
            StaleWeightsError: the ranks do not hold what is in the folder.
            EnvironmentFault: SGLang refused.
            EngineLost: its process ended.
        """
        digest = folder_digest(self._model, folder, self._dtype)
        orders, stamping = self._bringing(), Stamping(version=version, keeps_cache=keeps_cache)
        self._answered(weight_sync.read_folder, folder, orders, stamping)
        self._serve_if(version, digest)

    def close(self) -> None:
        """Let go of shared memory; safe to call twice."""
        self._host.close()
        self._reports.close()

    def _orders(self) -> list[Order]:
        """Return an order per rank, to look at its parameters."""
        self._serial += 1
        return [
            Order(
                serial=self._serial,
                model=self._model,
                rank=rank,
                tp_size=self._tp_size,
                reports=self._reports.path,
            )
            for rank in range(self._tp_size)
        ]

    def _bringing(self) -> list[Order]:
        """Return an order per rank, to write what it holds into the shadow."""
        self._host.staging()
        place = {"into": self._host.path, "slot": self._host.shadow, "dtype": str(self._dtype)}
        return [replace(order, **place) for order in self._orders()]

    def _carry_out(self, orders: list[Order], stamping: Stamping | None) -> None:
        self._answered(weight_sync.carry_out, orders, stamping)

    def _answered(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Run ``function`` with orders among its arguments; raise what ranks have against them."""
        try:
            self._run(function, *arguments)
        except EngineLost as error:
            if said := self._reports.last_words(self._serial):
                raise EngineLost(f"{error}; SGLang's ranks say:\n{said}") from error
            raise
        if problems := self._reports.problems(self._serial):
            raise LayoutError("\n".join(problems))

    def _serve_if(self, version: int, digest: int) -> None:
        """Serve what the ranks wrote into the shadow if it is what was announced."""
        self._host.seal()
        found = self._host.offer(version).publication.digest
        if found != digest:
            raise StaleWeightsError(
                f"SGLang took version {version} and holds digest {found:#018x}, announced was "
                f"{digest:#018x}; it must not serve them: close the engine and push again"
            )
        self._host.swap(version)


def folder_digest(model: ModelConfig, folder: Path, dtype: torch.dtype) -> int:
    """Return the digest of an HF folder in ``dtype``; reads one parameter at a time.

    Raises:
        InputError: the folder does not hold this model.
    """
    read = read_hf(folder, model).read
    [rank] = canonical_layout(model).ranks
    total = sum(
        digest_box(tile.parameter, tile.box, read(tile.parameter, tile.box).to(dtype))
        for tile in rank.tiles
    )
    return total % 2**64
