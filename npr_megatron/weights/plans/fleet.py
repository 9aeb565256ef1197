"""The transfer to a whole fleet: few plans, each for many alike.

A unit is an engine, or all engines of one layout that share nodes: what they want in common crosses
the wire to a node once. (Engines of unlike layouts cut parameters unlike and are planned apart.)
Units with equal layouts, equally spread over nodes, are of one class and share one plan, so the
description grows by a few numbers per engine. Each unit turns its class plan by
another number of steps around the source's replicas; else all units would ask the same replica for
the same weights at the same moment. Relays are none of this module's business.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from npr_megatron.weights.plans.plan import TransferPlan, plan_transfer
from npr_megatron.weights.tiles import Layout, RankLayout, Storage, Tile


@dataclass(frozen=True, slots=True)
class PlacedEngine:
    """An engine and where it runs."""

    layout: Layout
    nodes: tuple[int, ...]
    """Node of each rank, numbered throughout the fleet."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Engines that are planned together."""

    engines: tuple[int, ...]
    """Indices; target ranks of the plan are those of these engines, one engine after another."""
    class_index: int
    turn: int
    """Steps by which sources are turned around their replicas."""


class FleetTransfer:
    """What every engine of a fleet takes from a source. Pure and deterministic."""

    def __init__(
        self, source: Layout, engines: Sequence[PlacedEngine], *, weight_bytes: int = 2
    ) -> None:
        """Plan once for each class of units.

        Raises:
            LayoutError: see ``plan_transfer``.
        """
        classes: dict[tuple[tuple[str, ...], tuple[int, ...]], int] = {}
        units: list[Unit] = []
        targets: list[tuple[Layout, tuple[int, ...]]] = []
        for turn, members in enumerate(_units(engines)):
            layouts = [engines[member].layout for member in members]
            nodes = _renumbered([node for member in members for node in engines[member].nodes])
            key = tuple(layout.layout_id for layout in layouts), nodes
            if key not in classes:
                classes[key] = len(classes)
                ranks = tuple(rank for layout in layouts for rank in layout.ranks)
                targets.append((Layout(layouts[0].kind, ranks), nodes))
            units.append(Unit(members, classes[key], turn))
        self.units = tuple(units)
        self.targets = tuple(layout for layout, _ in targets)
        """Layout of all ranks of a unit, by class."""
        self.class_plans = tuple(
            plan_transfer(source, layout, target_nodes=nodes, weight_bytes=weight_bytes)
            for layout, nodes in targets
        )
        self._twins = _Twins(source)

    @property
    def fleet_id(self) -> str:
        """SHA-256 of everything (64 hexadecimal digits)."""
        plan_ids = [plan.plan_id for plan in self.class_plans]
        return hashlib.sha256(repr((plan_ids, self.units)).encode()).hexdigest()

    def plan_of(self, unit: Unit) -> TransferPlan:
        """Return the plan of one unit: that of its class, turned."""
        return self._twins.turned(self.class_plans[unit.class_index], unit.turn)


class _Twins:
    """Ranks that hold the same storage with the same contents, so that either may give it."""

    def __init__(self, source: Layout) -> None:
        contents: dict[int, dict[str, tuple[Storage, tuple[Tile, ...]]]] = {}
        holders: defaultdict[tuple[Storage, tuple[Tile, ...]], list[int]] = defaultdict(list)
        for rank, rank_layout in enumerate(source.ranks):
            if id(rank_layout) not in contents:
                contents[id(rank_layout)] = _contents(rank_layout)
            for content in contents[id(rank_layout)].values():
                holders[content].append(rank)
        self._of = {
            (rank, content[0].name): tuple(ranks)
            for content, ranks in holders.items()
            for rank in ranks
        }

    def turned(self, plan: TransferPlan, turn: int) -> TransferPlan:
        """Return ``plan`` with every source replaced by its ``turn``-th next twin."""
        table = plan.copy_table
        num_names = len(table.source_names)
        places = table.source_rank * num_names + table.source_storage
        distinct, place = np.unique(places, return_inverse=True)
        givers = np.zeros(len(distinct), np.int64)
        for index, one in enumerate(distinct.tolist()):
            rank, storage = divmod(one, num_names)
            twins = self._of[(rank, table.source_names[storage])]
            givers[index] = twins[(twins.index(rank) + turn) % len(twins)]
        return replace(plan, copy_table=replace(table, source_rank=givers[place]))


def _contents(rank: RankLayout) -> dict[str, tuple[Storage, tuple[Tile, ...]]]:
    tiles: defaultdict[str, list[Tile]] = defaultdict(list)
    for tile in rank.tiles:
        tiles[tile.storage].append(tile)
    return {one.name: (one, tuple(tiles[one.name])) for one in rank.storages}


def _units(engines: Sequence[PlacedEngine]) -> list[tuple[int, ...]]:
    """Return the groups of engines of one layout that share nodes, directly or through others."""
    unit_at: dict[tuple[str, int], list[int]] = {}
    for number, engine in enumerate(engines):
        places = _places(engine)
        neighbours = {id(unit_at[at]): unit_at[at] for at in places if at in unit_at}
        unit = [number, *(member for one in neighbours.values() for member in one)]
        for member in unit:
            unit_at |= dict.fromkeys(_places(engines[member]), unit)
    return sorted({tuple(sorted(unit)) for unit in unit_at.values()})


def _places(engine: PlacedEngine) -> list[tuple[str, int]]:
    return [(engine.layout.layout_id, node) for node in engine.nodes]


def _renumbered(nodes: Sequence[int]) -> tuple[int, ...]:
    """Number nodes by first appearance: what is spread alike gets equal numbers."""
    numbers: dict[int, int] = {}
    return tuple(numbers.setdefault(node, len(numbers)) for node in nodes)
