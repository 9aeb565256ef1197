"""What each request that SGLang knows was ordered to do, read once."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from npr_megatron.engine.sglang.stage import Orders


class OrderBook:
    """The orders of SGLang's requests; forgets a request when SGLang does."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, Orders | None] = WeakKeyDictionary()

    def of(self, request: Any) -> Orders | None:
        """Return the orders of a ``Req``; None for an ordinary request, and for none at all."""
        if request is None:
            return None
        try:
            return self._known[request]
        except KeyError:
            orders = Orders.of(request.sampling_params.custom_params)
            self._known[request] = orders
            return orders
