"""Weights into the parameters of one rank of SGLang: what a pushed order makes of them.

SGLang calls :func:`load` in each of its scheduler processes (``--custom-weight-loader``), those of
all data-parallel ranks. A rank cuts its part out of what was published by the same proven plan as
any other receiver (``weights.executors``); before it writes anything, the parameters of SGLang's
model must be exactly those that our layout declares, and behind the copies their digest must be the
expected one.

What is refused before anything was written is reported, and nothing has changed. What goes wrong
later is reported and raised, and SGLang ends its processes then: half of one version and half of
another is never served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from torch import Tensor, nn

from npr_megatron.engine.sglang.weights.handover import Order
from npr_megatron.errors import LayoutError, StaleWeightsError
from npr_megatron.weights.executors.shared_memory import Receiver
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.storages import check_storages
from npr_megatron.weights.tiles import Layout


def load(model: nn.Module, tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Carry out the order in ``tensors`` on the live parameters of ``model``; called by SGLang.

    Raises:
        StaleWeightsError: what was written is not what was published.
    """
    from sglang.srt.runtime_context import get_parallel  # pyright: ignore[reportMissingImports]

    carry_out(Order.of(tensors), model, get_parallel().dp_rank or 0)  # None: there is one


def carry_out(order: Order, model: nn.Module, dp_rank: int) -> None:
    """Do what ``order`` says on the live parameters of ``model``, and report it.

    Args:
        dp_rank: of this process.

    Raises:
        StaleWeightsError: what was written is not what was published.
    """
    live = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        check_storages(order.ranks.ranks[order.rank], live)
    except LayoutError as error:
        why = f"SGLang holds the model otherwise than our layout of it says:\n{error}"
        order.report(dp_rank, why)
        return
    try:
        if order.publication is not None:
            _take(order, order.publication, live)
    except Exception as error:
        order.report(dp_rank, f"{type(error).__name__}: {error}")  # the last words of this process
        raise
    order.report(dp_rank)


def _take(order: Order, publication: Publication, live: Mapping[str, Tensor]) -> None:
    """Overwrite the parameters with what was published, and look at what came of it."""
    shares = _receiver(order.host, order.ranks, order.rank).pull(publication, live)
    if shares != order.shares:
        raise StaleWeightsError(
            f"rank {order.rank} took version {publication.version} and holds digest shares "
            f"{shares}, expected were {order.shares}; it must not serve them"
        )


@lru_cache(maxsize=1)
def _receiver(host: Layout, ranks: Layout, rank: int) -> Receiver:
    """Return a receiver that keeps its plan and its mapping from one push to the next."""
    return Receiver(host, ranks, rank)
