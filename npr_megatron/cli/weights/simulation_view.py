"""Play a push through, undisturbed and disturbed, and show both beside the closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from npr_megatron.cli.weights.plan_tables import counted, in_time
from npr_megatron.planning.cluster import HardwareConfig
from npr_megatron.planning.conditions import Conditions
from npr_megatron.planning.push_floor import direct_time, relay_time
from npr_megatron.planning.push_simulation import SimulatedPush, simulate_direct, simulate_relay
from npr_megatron.planning.push_volume import PushVolume

_SHOWN_NODES = 12
"""More slow or dead nodes than these are counted only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One way of pushing."""

    closed_form_s: float
    undisturbed: SimulatedPush
    disturbed: SimulatedPush


def play(
    volume: PushVolume, cluster: HardwareConfig, conditions: Conditions, max_depth: int | None
) -> dict[str, Outcome]:
    """Return how a direct and a relayed push go."""
    return {
        "direct": Outcome(
            closed_form_s=direct_time(volume, cluster).seconds,
            undisturbed=simulate_direct(volume, cluster),
            disturbed=simulate_direct(volume, cluster, conditions),
        ),
        "relayed": Outcome(
            closed_form_s=relay_time(volume, cluster, max_depth).seconds,
            undisturbed=simulate_relay(volume, cluster, max_depth=max_depth),
            disturbed=simulate_relay(volume, cluster, conditions, max_depth),
        ),
    }


def show(
    console: Console,
    name: str,
    volume: PushVolume,
    conditions: Conditions,
    outcomes: Mapping[str, Outcome],
) -> None:
    """Print when the nodes of the fleet have the new version."""
    slow = _listed(conditions.slow, lambda rate: f"at {rate:.0%} of the rate")
    dead = _listed(conditions.deaths, lambda time: f"after {in_time(time)}")
    console.print(
        f"[bold]{name}[/bold]: {counted(volume.num_source_gpus, 'trainer GPU')} -> "
        f"{counted(volume.num_nodes, 'node')}; jitter {conditions.jitter:.0%}, "
        f"seed {conditions.seed}\nslow: {slow}\ndead: {dead}\n",
        soft_wrap=True,
    )
    table = Table(title="When nodes have the new version", title_justify="left", title_style="bold")
    table.add_column("way", style="cyan", no_wrap=True)
    for column in ("closed form", "undisturbed", "half", "90 %", "all living"):
        table.add_column(column, justify="right", no_wrap=True)
    for way, outcome in outcomes.items():
        times = outcome.closed_form_s, outcome.undisturbed.seconds, *_milestones(outcome.disturbed)
        table.add_row(way, *map(in_time, times))
    console.print(table)
    depth = outcomes["relayed"].disturbed.depth
    console.print(f"  relay chains have up to {counted(depth, 'node')}", soft_wrap=True)


def as_plain(
    name: str, volume: PushVolume, conditions: Conditions, outcomes: Mapping[str, Outcome]
) -> dict[str, Any]:
    """Return the same as plain JSON types; the keys are stable, times in seconds."""
    return {
        "model": name,
        "fleet_nodes": volume.num_nodes,
        "conditions": {
            "jitter": conditions.jitter,
            "slow": dict(conditions.slow),
            "deaths_s": dict(conditions.deaths),
            "detection_s": conditions.detection_s,
            "are_rates_known": conditions.are_rates_known,
            "seed": conditions.seed,
        },
        **{way: _plain(outcome) for way, outcome in outcomes.items()},
    }


def _plain(outcome: Outcome) -> dict[str, Any]:
    result = outcome.disturbed
    half, most, _ = _milestones(result)
    return {
        "closed_form_s": outcome.closed_form_s,
        "undisturbed_s": outcome.undisturbed.seconds,
        "half_s": half,
        "ninety_percent_s": most,
        "seconds": result.seconds,
        "depth": result.depth,
        "chunk_bytes": result.chunk_bytes,
        "finish_s": [time if math.isfinite(time) else None for time in result.finish_s],
    }


def _listed(values: Mapping[int, float], shown: Callable[[float], str]) -> str:
    if not values:
        return "none"
    if len(values) > _SHOWN_NODES:
        return counted(len(values), "node")
    return ", ".join(f"node {node} {shown(value)}" for node, value in values.items())


def _milestones(result: SimulatedPush) -> tuple[float, float, float]:
    """Return when half, nine tenths and all of the living nodes were done [s]."""
    times = sorted(time for time in result.finish_s if math.isfinite(time))
    if not times:
        return 0.0, 0.0, 0.0
    half, most = (times[math.ceil(len(times) * part) - 1] for part in (0.5, 0.9))
    return half, most, times[-1]
