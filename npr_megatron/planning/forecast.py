"""Everything that ``npr weights plan`` says about a push, as one value: table and JSON show it.

The keys of ``Forecast.as_json`` are stable: new ones may come, none changes its meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from npr_megatron.planning.cluster import HardwareConfig
from npr_megatron.planning.fleet_bytes import FleetUnit
from npr_megatron.planning.fleet_plan import FleetPlan
from npr_megatron.planning.pause import Pause, pauses
from npr_megatron.planning.push_floor import (
    PushFloor,
    PushTime,
    best_chunks,
    direct_time,
    push_floor,
    relay_time,
)
from npr_megatron.planning.push_request import WEIGHT_BYTES, ServedDtype
from npr_megatron.planning.push_volume import PushVolume
from npr_megatron.planning.relays import chain_length, count_roots
from npr_megatron.weights.plans.copy_table import CopyTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """Copies from storages of one name to storages of another, all layers together.

    Example: 3,760 copies from ``decoder.layers.*.mlp.linear_fc2.weight`` to
    ``layers.*.down_proj.weight``.
    """

    source: str
    target: str
    crosses_nodes: bool
    """Over NICs from the trainer; otherwise over NVLink, between GPUs of a node."""
    num_copies: int
    num_bytes: int
    largest_bytes: int
    """The largest copy [bytes]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaying:
    """How a relayed push is laid out."""

    num_chains: int
    depth: int
    """Nodes of the longest chain."""
    chunk_bytes: float
    """On one NIC [bytes]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a push moves and how long it takes."""

    volume: PushVolume
    minimum_bytes: int
    plan_ids: tuple[str, ...]
    """One per unit of the fleet."""
    engines_per_unit: int
    nodes_per_unit: int
    movements: tuple[Movement, ...]
    """Of the first unit, largest first."""
    egress: tuple[int, ...]
    """What each source rank sends, to one unit of each kind [bytes]."""
    floor: PushFloor
    direct: PushTime
    relay: PushTime
    relaying: Relaying
    pauses: tuple[Pause, ...]

    @property
    def wire_ratio(self) -> float:
        """Bytes that cross nodes / the fewest possible; 1.0 for a good plan."""
        return self.volume.wire_bytes / self.minimum_bytes

    @property
    def imbalance(self) -> float:
        """Busiest source / mean source."""
        return max(self.egress) * len(self.egress) / sum(self.egress)

    def as_json(self) -> dict[str, Any]:
        """Return the value as plain JSON types; times in seconds, sizes in bytes."""
        volume = self.volume
        return {
            "plan": {
                "ids": list(self.plan_ids),
                "engines_per_unit": self.engines_per_unit,
                "nodes_per_unit": self.nodes_per_unit,
                "movements": [asdict(movement) for movement in self.movements],
            },
            "bytes": {
                "model": volume.model_bytes,
                "largest_gpu": volume.gpu_bytes,
                "wire": volume.wire_bytes,
                "minimum": self.minimum_bytes,
                "wire_ratio": self.wire_ratio,
            },
            "egress": {
                "max": max(self.egress),
                "mean": sum(self.egress) / len(self.egress),
                "imbalance": self.imbalance,
                "per_source_rank": list(self.egress),
            },
            "fleet_nodes": volume.num_nodes,
            "floor": {**asdict(self.floor), "seconds": self.floor.seconds},
            "direct": asdict(self.direct),
            "relay": {**asdict(self.relay), **asdict(self.relaying)},
            "pauses": [asdict(pause) for pause in self.pauses],
        }


def forecast(
    fleet: FleetPlan,
    dtype: ServedDtype,
    cluster: HardwareConfig,
    max_depth: int | None = None,
) -> Forecast:
    """Return what the plans of a fleet move, and predict how long that takes on ``cluster``."""
    volume, unit = fleet.volume, fleet.units[0]
    relay = relay_time(volume, cluster, max_depth)
    return Forecast(
        volume=volume,
        minimum_bytes=fleet.minimum_bytes,
        plan_ids=tuple(unit.plan.plan_id for unit in fleet.units),
        engines_per_unit=unit.num_engines,
        nodes_per_unit=unit.num_nodes,
        movements=_movements(unit, WEIGHT_BYTES[dtype]),
        egress=volume.root_egress([1] * len(volume.groups)),
        floor=push_floor(volume, cluster),
        direct=direct_time(volume, cluster),
        relay=relay,
        relaying=_relaying(volume, cluster, max_depth),
        pauses=pauses(volume.gpu_bytes, relay.seconds, cluster),
    )


def _relaying(volume: PushVolume, cluster: HardwareConfig, max_depth: int | None) -> Relaying:
    roots = count_roots(volume, cluster.gpus_per_node, max_depth)
    source_s = max(volume.root_egress(roots)) / (cluster.nic_gb_per_s * 1e9)
    depths = [
        chain_length(group, chains) for group, chains in zip(volume.groups, roots, strict=True)
    ]
    chunks = [
        group[0].node_bytes / group[0].num_nics / best_chunks(group[0], cluster, depth, source_s)
        for group, depth in zip(volume.groups, depths, strict=True)
    ]
    return Relaying(num_chains=sum(roots), depth=max(depths), chunk_bytes=max(chunks))


def _movements(unit: FleetUnit, weight_bytes: int) -> tuple[Movement, ...]:
    found = [
        *_grouped(unit.plan.copy_table, weight_bytes, crosses_nodes=True),
        *_grouped(unit.plan.share_table, weight_bytes, crosses_nodes=False),
    ]
    return tuple(sorted(found, key=lambda one: (not one.crosses_nodes, -one.num_bytes, one.target)))


def _grouped(table: CopyTable, weight_bytes: int, *, crosses_nodes: bool) -> Iterable[Movement]:
    """Return the copies of a table by the names of their storages, layer numbers left out."""
    sizes = table.num_bytes(weight_bytes)
    sources, source_of = _classes(table.source_names)
    targets, target_of = _classes(table.target_names)
    pairs = source_of[table.source_storage] * len(targets) + target_of[table.target_storage]
    for pair in np.unique(pairs):
        here = sizes[pairs == pair]
        yield Movement(
            source=sources[pair // len(targets)],
            target=targets[pair % len(targets)],
            crosses_nodes=crosses_nodes,
            num_copies=len(here),
            num_bytes=int(here.sum()),
            largest_bytes=int(here.max()),
        )


def _classes(names: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Return the distinct names without layer and expert numbers, and the class of each name."""
    plain = [re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names]
    classes = sorted(set(plain))
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, np.array([numbers[name] for name in plain], np.int64)
