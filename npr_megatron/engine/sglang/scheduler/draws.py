"""Which number of which random stream each request of a batch takes next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npr_megatron.engine.sglang.stage import UNTAUGHT, Orders
from npr_megatron.records.randomness import UInt64Array, uniforms

FloatRows = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """How N rows of a batch are drawn, as aligned arrays; all other rows are none of ours."""

    rows: npt.NDArray[np.int64]
    """[N] in the batch, ascending."""
    keys: UInt64Array
    """[N] random streams."""
    counters: UInt64Array
    """[N] index of the number in its stream."""
    shape: FloatRows
    """[N, 4] temperature, top-k, top-p, min-p."""
    taught: npt.NDArray[np.int64]
    """[N] token to take whatever is drawn, or ``UNTAUGHT``."""

    @classmethod
    def of(cls, orders: Sequence[Orders | None], lengths: Sequence[int]) -> Draws:
        """Return the draws behind the last known token of each row.

        Args:
            orders: of each request of the batch.
            lengths: tokens of each row, the one computed last included. They say which token of the
                stage comes next, also where SGLang has not seen the ones before it yet.
        """
        rows = [row for row, order in enumerate(orders) if order is not None]
        ours = [order for order in orders if order is not None]
        # Behind the first pieces of a long prefill nothing is drawn: any index will do.
        indices = [
            max(0, lengths[row] - order.length) for row, order in zip(rows, ours, strict=True)
        ]
        counters = [i + order.first_index for i, order in zip(indices, ours, strict=True)]
        return cls(
            rows=np.array(rows, np.int64),
            keys=np.array([order.key for order in ours], np.uint64),
            counters=np.array(counters, np.uint64),
            shape=np.array([order.shape for order in ours], np.float64).reshape(-1, 4),
            taught=np.array([_taught(o, i) for o, i in zip(ours, indices, strict=True)], np.int64),
        )

    @property
    def uniforms(self) -> FloatRows:
        """[N] in [0, 1)."""
        return uniforms(self.keys, self.counters)


def _taught(orders: Orders, index: int) -> int:
    return orders.taught[index] if index < len(orders.taught) else UNTAUGHT
