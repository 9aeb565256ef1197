"""The weights of an SGLang engine, as its owner sees them: what is served, staged and pushed.

There is one way in. Whoever has weights (an HF folder, a trainer's arena, a peer) fills the host's
shadow while the engine decodes; SGLang's ranks then cut their parts out of it between two stages
and check them, later tokens are stamped with the version, and the shadow is what is served.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.sglang.weights import weight_sync
from npr_megatron.engine.sglang.weights.handover import Order, Reports
from npr_megatron.engine.sglang.weights.host_weights import HostWeights
from npr_megatron.engine.sglang.weights.weight_sync import Stamping
from npr_megatron.errors import EngineLost, LayoutError
from npr_megatron.weights.storages import DTYPES

RunBeside = Callable[..., Any]
"""Runs a coroutine function of ``weight_sync`` beside SGLang's tokenizer manager, with the
arguments behind it, and returns or raises what it does."""


class PushedWeights:
    """The weights of one engine.

    After an error of ``commit`` other than those that say that nothing has changed, the ranks may
    hold a mixture: close the engine.

    Args:
        run: how the process of the engine is reached.

    Raises:
        EnvironmentFault: not enough memory for two copies of the model.
    """

    def __init__(self, model: ModelConfig, config: EngineConfig, run: RunBeside) -> None:
        self._model, self._tp_size, self._run = model, config.tp_size, run
        self._host = HostWeights(model, DTYPES[config.dtype], config.tp_size)
        self._reports = Reports(config.num_devices)
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

    def close(self) -> None:
        """Let go of shared memory; safe to call twice."""
        self._host.close()
        self._reports.close()

    def _orders(self) -> list[Order]:
        """Return an order per tensor-parallel rank, to look at its parameters."""
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

    def _carry_out(self, orders: list[Order], stamping: Stamping | None) -> None:
        """Have the ranks carry out ``orders``; raise what they have against them."""
        try:
            self._run(weight_sync.carry_out, orders, stamping)
        except EngineLost as error:
            if said := self._reports.last_words(self._serial):
                raise EngineLost(f"{error}; SGLang's ranks say:\n{said}") from error
            raise
        if problems := self._reports.problems(self._serial):
            raise LayoutError("\n".join(problems))
