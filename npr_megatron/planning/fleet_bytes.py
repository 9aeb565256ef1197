"""The bytes that the plans of a fleet move between nodes, and the fewest that could.

The former are counted from copies, the latter from tiles: equal only if the plans waste nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import sub

import numpy as np

from npr_megatron.config.model import ModelConfig
from npr_megatron.planning.push_request import WEIGHT_BYTES, ServedDtype
from npr_megatron.planning.push_volume import NodeKind, PushVolume
from npr_megatron.weights.box import Box
from npr_megatron.weights.layouts.served import Quantisation
from npr_megatron.weights.names import canonical_parameters
from npr_megatron.weights.plans.copies import element_bytes
from npr_megatron.weights.plans.plan import TransferPlan
from npr_megatron.weights.tiles import Layout, RankLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetUnit:
    """Engines that share nodes and are planned together, and all units of the fleet like them."""

    target: Layout
    """Ranks of all its engines."""
    plan: TransferPlan
    num_engines: int
    nodes: tuple[tuple[int, ...], ...]
    """Nodes of the fleet, for each such unit."""

    @property
    def count(self) -> int:
        """Such units in the fleet."""
        return len(self.nodes)

    @property
    def num_nodes(self) -> int:
        """Nodes of one unit."""
        return len(self.nodes[0])


def count_bytes(
    units: Sequence[FleetUnit],
    *,
    model_bytes: int,
    num_sources: int,
    gpus_per_node: int,
    weight_bytes: int,
) -> tuple[PushVolume, int]:
    """Return what the plans of ``units`` move, and the fewest bytes that could cross nodes."""
    nodes = _nodes(units, gpus_per_node, weight_bytes)
    kinds = tuple(_kinds(units, nodes, num_sources, weight_bytes))
    minimum = sum(
        unit.count * sum(node.needed_bytes for node in unit_nodes)
        for unit, unit_nodes in zip(units, nodes, strict=True)
    )
    return PushVolume(model_bytes=model_bytes, kinds=kinds), minimum


def served_bytes(model: ModelConfig, dtype: ServedDtype) -> int:
    """Return the bytes of one whole model as served, scales included."""
    quantised = Quantisation.of(model) if dtype == "fp8" else None
    total = 0
    for parameter in canonical_parameters(model):
        num_elements = math.prod(parameter.shape)
        if quantised is not None and parameter.name in quantised.shapes:
            num_blocks = math.prod(quantised.grid(parameter.name))
            total += num_elements * element_bytes("fp8_e4m3", 1)
            total += num_blocks * element_bytes("fp32", 1)
        else:
            total += num_elements * element_bytes(parameter.dtype, WEIGHT_BYTES[dtype])
    return total


@dataclass(frozen=True, slots=True)
class _Node:
    """A node of a unit, by what its ranks hold."""

    content: int
    needed_bytes: int
    gpu_bytes: tuple[int, ...]


def _nodes(units: Sequence[FleetUnit], gpus_per_node: int, weight_bytes: int) -> list[list[_Node]]:
    """Return the nodes of each unit; those with the same engine ranks have the same content."""
    known: dict[frozenset[int], tuple[int, int]] = {}
    nodes: list[list[_Node]] = []
    for unit in units:
        nodes.append([])
        for first in range(0, len(unit.target.ranks), gpus_per_node):
            ranks = unit.target.ranks[first : first + gpus_per_node]
            distinct = {id(rank): rank for rank in ranks}  # engines share their ranks' layouts
            key = frozenset(distinct)
            if key not in known:
                known[key] = len(known), _needed_bytes(distinct.values(), weight_bytes)
            held = tuple(held_bytes(rank, weight_bytes) for rank in ranks)
            nodes[-1].append(_Node(*known[key], held))
    return nodes


def _kinds(
    units: Sequence[FleetUnit],
    nodes: Sequence[Sequence[_Node]],
    num_sources: int,
    weight_bytes: int,
) -> Iterable[NodeKind]:
    """Return one kind per node of each unit."""
    for unit, unit_nodes in zip(units, nodes, strict=True):
        table = unit.plan.copy_table
        node_of_rank = np.array(unit.plan.target_nodes)
        taken = np.zeros((unit.num_nodes, num_sources), np.int64)
        places = node_of_rank[table.target_rank], table.source_rank
        np.add.at(taken, places, table.num_bytes(weight_bytes))
        for number, node in enumerate(unit_nodes):
            yield NodeKind(
                nodes=tuple(nodes_of_one[number] for nodes_of_one in unit.nodes),
                content=node.content,
                bytes_from=tuple(int(size) for size in taken[number]),
                gpu_bytes=node.gpu_bytes,
            )


def held_bytes(rank: RankLayout, weight_bytes: int) -> int:
    """Return what a rank holds, padding included."""
    return sum(
        math.prod(storage.shape) * element_bytes(storage.dtype, weight_bytes)
        for storage in rank.storages
    )


def _needed_bytes(ranks: Iterable[RankLayout], weight_bytes: int) -> int:
    """Return the bytes that ranks of one node need, what several hold counted once."""
    needed: dict[tuple[str, Box], int] = {}
    for rank in ranks:
        sizes = {s.name: element_bytes(s.dtype, weight_bytes) for s in rank.storages}
        for tile in rank.tiles:
            key = tile.parameter, tile.box
            if key not in needed:
                extents = map(sub, tile.box.stop, tile.box.start)  # a Box is slow at this
                needed[key] = math.prod(extents) * sizes[tile.storage]
    return sum(needed.values())
