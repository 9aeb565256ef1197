"""What is done after two calls of SGLang's scheduler."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import (  # pyright: ignore[reportMissingImports]
    FINISH_LENGTH,
)

from npr_megatron.engine.sglang.scheduler.budgets import BudgetBook
from npr_megatron.engine.sglang.scheduler.draws import Draws
from npr_megatron.engine.sglang.scheduler.orders import OrderBook
from npr_megatron.engine.sglang.scheduler.positions import Offsets
from npr_megatron.engine.sglang.scheduler.sampler import attach


class BatchHook:
    """After ``ForwardBatch.init_new``: shifts the positions of stages and says how they are drawn.

    Attention kernels and decoding graphs take positions from the batch, which SGLang has not used
    for anything by then.
    """

    def __init__(self, orders: OrderBook) -> None:
        self._orders = orders
        self._offsets = Offsets()

    def __call__(
        self, forward_batch: Any, _cls: type, batch: Any, *_args: Any, **_kwargs: Any
    ) -> None:
        orders = [self._orders.of(request) for request in batch.reqs]
        if all(order is None for order in orders):
            return
        offsets = tuple(0 if order is None else order.offset for order in orders)
        is_decode = forward_batch.forward_mode.is_decode()
        forward_batch.positions = self._offsets.added(
            forward_batch.positions, offsets, None if is_decode else forward_batch.extend_seq_lens
        )
        attach(forward_batch.sampling_info, Draws.of(orders, batch.seq_lens_cpu.tolist()))


class BudgetHook:
    """After ``Req.update_finish_state``: stops branches whose shared budget is used up."""

    def __init__(self, orders: OrderBook) -> None:
        self._orders = orders
        self._budgets = BudgetBook()

    def __call__(self, _result: None, request: Any, *_args: Any, **_kwargs: Any) -> None:
        orders = self._orders.of(request)
        if orders is None or orders.budget is None:
            return
        num_taken, has_ended = len(request.output_ids), request.finished()
        must_stop = self._budgets.take(orders.budget, num_taken, has_ended=has_ended)
        if must_stop and not has_ended:
            request.finished_reason = FINISH_LENGTH(length=num_taken)
            request.finished_len = num_taken
