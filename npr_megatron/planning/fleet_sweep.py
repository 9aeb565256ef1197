"""Push times over the size of the fleet: the same trainer, engine and nodes, only more of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from npr_megatron.planning.cluster import HardwareConfig
from npr_megatron.planning.fleet_plan import FleetPlan
from npr_megatron.planning.push_floor import direct_time, push_floor, relay_time
from npr_megatron.planning.push_volume import PushVolume

_SMALLEST_SWEEP = 512
"""Units up to which a sweep goes at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One fleet."""

    num_gpus: int
    floor_s: float
    direct_s: float
    relay_s: float


def sweep_fleet(
    fleet: FleetPlan, cluster: HardwareConfig, max_depth: int | None = None
) -> tuple[SweepPoint, ...]:
    """Return the times of fleets of 1, 2, 4, ... units, to beyond the size of ``fleet``."""
    unit = fleet.units[0]
    points: list[SweepPoint] = []
    count = 1
    while not points or points[-1].num_gpus < len(unit.target.ranks) * max(
        _SMALLEST_SWEEP, unit.count
    ):
        volume = _of_units(fleet.volume, unit.num_nodes, count)
        points.append(
            SweepPoint(
                num_gpus=count * len(unit.target.ranks),
                floor_s=push_floor(volume, cluster).seconds,
                direct_s=direct_time(volume, cluster).seconds,
                relay_s=relay_time(volume, cluster, max_depth).seconds,
            )
        )
        count *= 2
    return tuple(points)


def _of_units(volume: PushVolume, nodes_per_unit: int, count: int) -> PushVolume:
    """Return the volume of ``count`` units like the first of ``volume``."""
    kinds = tuple(
        replace(kind, nodes=tuple(range(number, count * nodes_per_unit, nodes_per_unit)))
        for number, kind in enumerate(volume.kinds[:nodes_per_unit])
    )
    return replace(volume, kinds=kinds)
