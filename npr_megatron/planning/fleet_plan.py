"""The transfer plans of a whole fleet.

Engines fill nodes in order. Those that share nodes form a unit and are planned together; all units
but an incomplete last one are alike, so few plans are made, however large the fleet. Turns around
the source's replicas, which ``weights.plans.fleet`` adds per unit, leave times as they are: the
plan of each unit is balanced already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from npr_megatron.errors import ConfigError, LayoutError
from npr_megatron.planning.cluster import HardwareConfig
from npr_megatron.planning.fleet_bytes import FleetUnit, count_bytes, held_bytes, served_bytes
from npr_megatron.planning.push_floor import GB
from npr_megatron.planning.push_request import WEIGHT_BYTES, PushRequest
from npr_megatron.planning.push_volume import PushVolume
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.layouts.served import Quantisation, quantised_layout
from npr_megatron.weights.plans.fleet import FleetTransfer, PlacedEngine
from npr_megatron.weights.proof.verify import verify_transfer
from npr_megatron.weights.tiles import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """Who takes what from whom, in the whole fleet."""

    source: Layout
    units: tuple[FleetUnit, ...]
    """One per class: complete ones, then an incomplete one if there is one."""
    volume: PushVolume
    minimum_bytes: int
    """What must cross into the fleet's nodes, counted from the tiles alone [bytes]."""


def plan_fleet(request: PushRequest, cluster: HardwareConfig) -> FleetPlan:
    """Return the plans of ``request`` on nodes of ``cluster``.

    Raises:
        ConfigError: the model cannot be cut so, or the cluster is too small; lists every problem.
    """
    source, engine = _layouts(request)
    weight_bytes = WEIGHT_BYTES[request.dtype]
    problems = [*_shortages(request, engine, cluster, weight_bytes)]
    if problems:
        raise ConfigError(problems)
    units = tuple(_units(source, engine, request, cluster.gpus_per_node, weight_bytes))
    volume, minimum = count_bytes(
        units,
        model_bytes=served_bytes(request.model, request.dtype),
        num_sources=len(source.ranks),
        gpus_per_node=cluster.gpus_per_node,
        weight_bytes=weight_bytes,
    )
    return FleetPlan(source=source, units=units, volume=volume, minimum_bytes=minimum)


def require_proven(fleet: FleetPlan) -> None:
    """Prove every plan of a fleet with the independent verifier.

    Raises:
        LayoutError: a plan is wrong, which is a defect of the planner.
    """
    for unit in fleet.units:
        if problems := verify_transfer(unit.plan, fleet.source, unit.target):
            raise LayoutError(
                f"plan {unit.plan.plan_id[:12]} is wrong in {len(problems)} places, first: "
                f"{problems[0]}; report this with the command you gave"
            )


def _layouts(request: PushRequest) -> tuple[Layout, Layout]:
    """Return what trainer and engine hold as served; the problems of both at once."""
    model, problems = request.model, list[str]()
    makers = {
        "trainer": lambda: trainer_layout(model, request.parallel),
        "engine": lambda: engine_layout(
            model, request.engine_tp, request.engine_ep, request.engine
        ),
    }
    layouts: list[Layout] = []
    for side, make in makers.items():
        try:
            layout = make()
            if request.dtype == "fp8":
                layout = quantised_layout(
                    layout, Quantisation.of(model), may_straddle=side == "trainer"
                )
            layouts.append(layout)
        except LayoutError as error:
            problems += [f"{side}: {problem}" for problem in str(error).splitlines()]
    if problems:
        raise ConfigError(problems)
    return layouts[0], layouts[1]


def _shortages(
    request: PushRequest, engine: Layout, cluster: HardwareConfig, weight_bytes: int
) -> Iterable[str]:
    """Return why the cluster cannot hold trainer and fleet."""
    per_node = cluster.gpus_per_node
    trainer_nodes = math.ceil(request.parallel.world_size / per_node)
    fleet_nodes = math.ceil(request.num_fleet_gpus / per_node)
    if cluster.num_nodes is not None and trainer_nodes + fleet_nodes > cluster.num_nodes:
        yield (
            f"{request.parallel.world_size} trainer and {request.num_fleet_gpus} fleet GPUs need "
            f"{trainer_nodes} + {fleet_nodes} nodes of {per_node}, the cluster has num_nodes "
            f"{cluster.num_nodes}; ask for fewer engines or describe a larger cluster"
        )
    held = max(held_bytes(rank, weight_bytes) for rank in engine.ranks)
    if held > cluster.gpu_memory_gb * GB:
        yield (
            f"an engine of tp {request.engine_tp} holds {held / GB:.1f} GB of {request.dtype} "
            f"weights per GPU, a GPU has gpu_memory_gb {cluster.gpu_memory_gb:g}; raise tp of "
            "--engine"
        )


def _units(
    source: Layout, engine: Layout, request: PushRequest, gpus_per_node: int, weight_bytes: int
) -> Iterable[FleetUnit]:
    """Fill nodes with engines in order, and return the classes of units they fall into."""
    size = len(engine.ranks)
    engines = [
        PlacedEngine(engine, tuple((number * size + rank) // gpus_per_node for rank in range(size)))
        for number in range(request.num_engines)
    ]
    transfer = FleetTransfer(source, engines, weight_bytes=weight_bytes)
    for number, plan in enumerate(transfer.class_plans):
        members = [unit.engines for unit in transfer.units if unit.class_index == number]
        yield FleetUnit(
            target=transfer.targets[number],
            plan=plan,
            num_engines=len(members[0]),
            nodes=tuple(
                tuple(sorted({node for one in unit for node in engines[one].nodes}))
                for unit in members
            ),
        )
