"""From two layouts to the copies that turn one into the other. Pure and deterministic.

Every rank that plans the same two layouts gets the same plan with the same ``plan_id``, so plans
are never sent. Each target element is written exactly once. What several ranks of a node want
crosses the wire to one of them and is shared from there, therefore no byte crosses twice. Where
replicas hold the same elements, the load is spread over them by bytes, and so is what arrives over
those who share it. Touches no tensor. ``verify`` proves a plan without using anything of this
module's reasoning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from npr_megatron.weights.plans.assignment import assign, find_pieces
from npr_megatron.weights.plans.copies import Copy
from npr_megatron.weights.plans.copy_table import CopyTable
from npr_megatron.weights.tiles import Layout


@dataclass(frozen=True, eq=False)
class TransferPlan:
    """All copies between two layouts, sorted by target. Equal plans have equal ``plan_id``."""

    source_id: str
    """``layout_id`` of the source."""
    target_id: str
    copy_table: CopyTable
    """From source ranks to target ranks."""
    share_table: CopyTable
    """From target ranks to target ranks of the same node, what ``copy_table`` brought there."""
    target_nodes: tuple[int, ...] | None = None
    """Node of each target rank; None: each its own."""
    source_nodes: tuple[int, ...] | None = None
    """Node of each source rank, numbered like ``target_nodes``; None: no target rank is there."""

    @classmethod
    def of(
        cls,
        source_id: str,
        target_id: str,
        copies: Sequence[Copy],
        shares: Sequence[Copy] = (),
        *,
        target_nodes: tuple[int, ...] | None = None,
        source_nodes: tuple[int, ...] | None = None,
    ) -> TransferPlan:
        """Return the plan that consists of given copies and shares."""
        tables = CopyTable.of(copies), CopyTable.of(shares)
        return cls(source_id, target_id, *tables, target_nodes, source_nodes)

    @cached_property
    def plan_id(self) -> str:
        """SHA-256 of the plan (64 hexadecimal digits)."""
        tables = self.copy_table.digest(), self.share_table.digest()
        nodes = self.target_nodes, self.source_nodes
        content = repr((self.source_id, self.target_id, *tables, *nodes))
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def copies(self) -> tuple[Copy, ...]:
        """What source ranks give to target ranks."""
        return self.copy_table.copies()

    @cached_property
    def shares(self) -> tuple[Copy, ...]:
        """What target ranks then give to others of their node: both ranks are target ranks.

        They read nothing but what ``copies`` wrote, so their order does not matter.
        """
        return self.share_table.copies()

    @property
    def num_elements(self) -> int:
        """Elements that ``copies`` move."""
        return int(self.copy_table.num_elements.sum())

    def wire_bytes(self, weight_bytes: int) -> int:
        """Return the bytes that cross between nodes, ``weight_bytes`` per element not pinned."""
        sizes = self.copy_table.num_bytes(weight_bytes)
        if self.source_nodes is not None:
            here = self.copy_table.target_rank
            if self.target_nodes is not None:
                here = np.array(self.target_nodes)[here]
            sizes = sizes[np.array(self.source_nodes)[self.copy_table.source_rank] != here]
        return int(sizes.sum())

    def copies_to(self, target_rank: int) -> tuple[Copy, ...]:
        """Return the copies that one target rank receives."""
        return _where(self.copy_table, self.copy_table.target_rank == target_rank).copies()

    def copies_from(self, source_rank: int) -> tuple[Copy, ...]:
        """Return what one source rank gives, beginning with another target rank than the next."""
        given = _where(self.copy_table, self.copy_table.source_rank == source_rank)
        distance = given.target_rank - source_rank
        if len(given):
            distance %= 1 + int(self.copy_table.target_rank.max())
        return given.take(np.argsort(distance, kind="stable")).copies()

    def shares_to(self, target_rank: int) -> tuple[Copy, ...]:
        """Return what one target rank gets from others of its node."""
        return _where(self.share_table, self.share_table.target_rank == target_rank).copies()

    def shares_from(self, target_rank: int) -> tuple[Copy, ...]:
        """Return what one target rank gives to others of its node."""
        return _where(self.share_table, self.share_table.source_rank == target_rank).copies()


def _where(table: CopyTable, rows: np.ndarray) -> CopyTable:
    return table.take(np.flatnonzero(rows))


def plan_transfer(
    source: Layout,
    target: Layout,
    *,
    target_nodes: Sequence[int] | None = None,
    source_nodes: Sequence[int] | None = None,
    weight_bytes: int = 2,
) -> TransferPlan:
    """Return the copies that fill every tile of ``target`` from ``source``.

    Args:
        target_nodes: node of each target rank; None: every rank its own.
        source_nodes: node of each source rank, numbered alike; what a node already holds is taken
            from there. None: nothing is.
        weight_bytes: bytes of an element whose dtype is not pinned, to weigh loads; all who plan
            together must agree on it.

    Raises:
        LayoutError: a target element is nowhere in ``source`` or has another pinned dtype there, or
            boxes of one layout overlap in part (replicas must be equal boxes).

    Example:
        tp 2 -> tp 1 of gate and up [8, 4] gives four copies of [4, 4].
    """
    to_nodes = None if target_nodes is None else tuple(target_nodes)
    from_nodes = None if source_nodes is None else tuple(source_nodes)
    pieces = find_pieces(source, target, to_nodes, weight_bytes)
    copies, shares = assign(pieces, from_nodes)
    return TransferPlan(source.layout_id, target.layout_id, copies, shares, to_nodes, from_nodes)
