"""How many bytes must cross the wire at least, whatever the plan.

Each node needs every canonical element that its target ranks declare, once, except those that
source ranks of the same node hold: Q_j. Nothing crosses twice if the sum of all Q_j does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from npr_megatron.weights.plans.copies import element_bytes
from npr_megatron.weights.proof.declared import PINNED, Declared, declare
from npr_megatron.weights.proof.intervals import Numbers, Spans, sums, united
from npr_megatron.weights.tiles import Layout


def fewest_wire_bytes(
    source: Layout,
    target: Layout,
    *,
    target_nodes: Sequence[int] | None = None,
    source_nodes: Sequence[int] | None = None,
    weight_bytes: int = 2,
) -> dict[int, int]:
    """Return the bytes that each node with target ranks must receive; None as in a plan."""
    there, here = declare(source, target)
    nodes = nodes_of(target_nodes, len(target.ranks))
    elements = fewest_elements(there, here, nodes, source_nodes)
    sizes = np.array([element_bytes(dtype, weight_bytes) for dtype in PINNED])
    return dict(zip(np.unique(nodes).tolist(), (elements @ sizes).tolist(), strict=True))


def nodes_of(nodes: Sequence[int] | None, num_ranks: int) -> Numbers:
    """Return the node of each target rank; None: each its own."""
    return np.arange(num_ranks) if nodes is None else np.array(nodes, np.int64)


def fewest_elements(
    there: Declared, here: Declared, target_nodes: Numbers, source_nodes: Sequence[int] | None
) -> Numbers:
    """Return [nodes with target ranks, dtypes]: the elements of each pinned dtype."""
    node = target_nodes[here.rank]
    needs = _Needs(node, here.parameter, here.dtype[here.spans.group])
    wanted = Spans(needs.number, here.low, here.high)
    total = united(wanted, len(needs.first))
    if source_nodes is not None:
        at = np.array(source_nodes, np.int64)[there.rank]
        need, tile = needs.find(at, there.parameter, there.dtype[there.spans.group])
        present = Spans(need, there.low[tile], there.high[tile])
        both = Spans(
            *(np.concatenate(two) for two in zip(_columns(wanted), _columns(present), strict=True))
        )
        total = united(both, len(needs.first)) - united(present, len(needs.first))
    nodes = np.unique(target_nodes)
    cell = np.searchsorted(nodes, node[needs.first]) * len(PINNED)
    cell += here.dtype[here.spans.group[needs.first]]
    return sums(total, cell, len(nodes) * len(PINNED)).reshape(len(nodes), len(PINNED))


class _Needs:
    """Each parameter, in one dtype, that a node wants."""

    def __init__(self, node: Numbers, parameter: Numbers, dtype: Numbers) -> None:
        self._num_parameters = 1 + int(parameter.max())
        self._keys, self.first, self.number = np.unique(
            self._key(node, parameter, dtype), return_index=True, return_inverse=True
        )

    def _key(self, node: Numbers, parameter: Numbers, dtype: Numbers) -> Numbers:
        return (node * self._num_parameters + parameter) * len(PINNED) + dtype

    def find(self, node: Numbers, parameter: Numbers, dtype: Numbers) -> tuple[Numbers, Numbers]:
        """Return the need that tiles serve, and these tiles; others serve none."""
        key = self._key(node, parameter, dtype)
        need = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        tile = np.flatnonzero((self._keys[need] == key) & (parameter < self._num_parameters))
        return need[tile], tile


def _columns(spans: Spans) -> tuple[Numbers, Numbers, Numbers]:
    return spans.group, spans.low, spans.high
