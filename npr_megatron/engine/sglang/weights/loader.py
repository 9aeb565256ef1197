"""Weights into the parameters of one rank of SGLang: what a pushed order makes of them.

SGLang calls :func:`load` in each of its scheduler processes (``--custom-weight-loader``). A rank
cuts its part out of what was published by the same proven plan as any other receiver
(``weights.executors``); before it writes anything, the parameters of SGLang's model must be exactly
those that our layout declares, and behind the copies their digest must be the expected one.

What is refused before anything was written is reported, and nothing has changed. What goes wrong
later is reported and raised, and SGLang ends its processes then: half of one version and half of
another is never served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from npr_megatron.engine.sglang.weights.handover import Means, Order
from npr_megatron.engine.sglang.weights.shared_bytes import writable_memory
from npr_megatron.errors import LayoutError, StaleWeightsError
from npr_megatron.weights.executors.cuda_ipc import DeviceReceiver
from npr_megatron.weights.executors.inproc import Move, moves_of, run_moves
from npr_megatron.weights.executors.shared_memory import Receiver
from npr_megatron.weights.executors.slots import Slots
from npr_megatron.weights.plans.plan import plan_transfer
from npr_megatron.weights.proof.verify import verify_transfer
from npr_megatron.weights.storages import DTYPES, check_storages
from npr_megatron.weights.tiles import Layout

_RECEIVERS: dict[Means, Any] = {"shared_memory": Receiver, "cuda_ipc": DeviceReceiver}


def load(model: nn.Module, tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Carry out the order in ``tensors`` on the live parameters of ``model``.

    Raises:
        StaleWeightsError: what was written is not what was published.
    """
    order = Order.of(tensors)
    live = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        check_storages(order.ranks.ranks[order.rank], live)
    except LayoutError as error:
        order.report(f"SGLang holds the model otherwise than our layout of it says:\n{error}")
        return
    try:
        if order.publication is not None:
            _take(order, live)
        elif order.into is not None:
            _give(order, order.into, live)
    except Exception as error:
        order.report(f"{type(error).__name__}: {error}")  # the last words of this process
        raise
    order.report()


def _take(order: Order, live: Mapping[str, Tensor]) -> None:
    """Overwrite the parameters with what was published, and look at what came of it."""
    publication = order.publication
    assert publication is not None
    receiver = _receiver(order.means, order.published, order.ranks, order.rank)
    shares = receiver.pull(publication, live)
    if order.shares is not None and shares != order.shares:
        raise StaleWeightsError(
            f"rank {order.rank} took version {publication.version} and holds digest shares "
            f"{shares}, expected were {order.shares}; it must not serve them"
        )


def _give(order: Order, path: str, live: Mapping[str, Tensor]) -> None:
    """Write the parameters to the host's memory; each element by one rank."""
    [host] = order.host.ranks
    dtype = next(x for x in DTYPES.values() if str(x) == order.dtype)
    slots = Slots(writable_memory(path), host, dtype)
    moves = [x for x in _moves_back(order.ranks, order.host) if x.source_rank == order.rank]
    run_moves(moves, {order.rank: live}, {0: slots.storages(order.slot)})


@lru_cache(maxsize=4)
def _receiver(means: Means, published: Layout, ranks: Layout, rank: int) -> Any:
    """Return a receiver that keeps its plan and its mappings from one push to the next."""
    return _RECEIVERS[means](published, ranks, rank)


@lru_cache(maxsize=1)
def _moves_back(ranks: Layout, host: Layout) -> tuple[Move, ...]:
    plan = plan_transfer(ranks, host)
    if problems := verify_transfer(plan, ranks, host):
        raise LayoutError("the planned transfer is wrong:\n" + "\n".join(problems))
    return moves_of(plan.copies)  # one target rank shares with nobody
