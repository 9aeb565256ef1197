"""The transfer plans of a whole fleet, and the bytes they move between nodes.

Engines fill nodes in order. The fleet is cut into units: the fewest engines that fill whole nodes.
All units but an incomplete last one are alike, so one plan each is made, however large the fleet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from npr_megatron.config.model import ModelConfig
from npr_megatron.errors import ConfigError, LayoutError
from npr_megatron.planning.cluster import HardwareConfig
from npr_megatron.planning.push_floor import GB
from npr_megatron.planning.push_request import WEIGHT_BYTES, PushRequest, ServedDtype
from npr_megatron.planning.push_volume import NodeKind, PushVolume
from npr_megatron.weights.box import Box
from npr_megatron.weights.copies import element_bytes
from npr_megatron.weights.layout import engine_layout, trainer_layout
from npr_megatron.weights.names import canonical_parameters
from npr_megatron.weights.plan import TransferPlan, plan_transfer
from npr_megatron.weights.served_layout import Quantisation, quantised_layout
from npr_megatron.weights.tiles import Layout, RankLayout
from npr_megatron.weights.verify import verify_transfer

Needs = dict[tuple[str, Box], int]
"""Bytes of each distinct box of each parameter that a node needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetUnit:
    """Neighbouring engines that fill their nodes."""

    target: Layout
    """Ranks of all its engines."""
    plan: TransferPlan
    count: int
    """Such units in the fleet."""
    num_engines: int
    num_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """Who takes what from whom, in the whole fleet."""

    source: Layout
    units: tuple[FleetUnit, ...]
    """Complete ones, then an incomplete one if there is one."""
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
    needs = [_needs(unit, cluster.gpus_per_node, weight_bytes) for unit in units]
    volume = PushVolume(
        model_bytes=served_bytes(request.model, request.dtype),
        kinds=tuple(_kinds(units, needs, len(source.ranks), cluster.gpus_per_node, weight_bytes)),
    )
    minimum = sum(
        unit.count * sum(sum(node.values()) for node in nodes)
        for unit, nodes in zip(units, needs, strict=True)
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
    held = max(_held_bytes([rank], weight_bytes) for rank in engine.ranks)
    if held > cluster.gpu_memory_gb * GB:
        yield (
            f"an engine of tp {request.engine_tp} holds {held / GB:.1f} GB of {request.dtype} "
            f"weights per GPU, a GPU has gpu_memory_gb {cluster.gpu_memory_gb:g}; raise tp of "
            "--engine"
        )


def _units(
    source: Layout, engine: Layout, request: PushRequest, gpus_per_node: int, weight_bytes: int
) -> Iterable[FleetUnit]:
    per_unit = math.lcm(len(engine.ranks), gpus_per_node) // len(engine.ranks)
    complete, rest = divmod(request.num_engines, per_unit)
    for count, num_engines in ((complete, per_unit), (1, rest)):
        if count == 0 or num_engines == 0:
            continue
        target = Layout(engine.kind, engine.ranks * num_engines)
        nodes = [rank // gpus_per_node for rank in range(len(target.ranks))]
        plan = plan_transfer(source, target, target_nodes=nodes, weight_bytes=weight_bytes)
        yield FleetUnit(
            target=target,
            plan=plan,
            count=count,
            num_engines=num_engines,
            num_nodes=nodes[-1] + 1,
        )


def _kinds(
    units: Sequence[FleetUnit],
    needs: Sequence[Sequence[Needs]],
    num_sources: int,
    gpus_per_node: int,
    weight_bytes: int,
) -> Iterable[NodeKind]:
    """Return one kind per node of each unit, numbered through the fleet."""
    contents: dict[frozenset[tuple[str, Box]], int] = {}
    first = 0
    for unit, nodes in zip(units, needs, strict=True):
        table = unit.plan.copy_table
        sizes, node_of = table.num_bytes(weight_bytes), table.target_rank // gpus_per_node
        for node in range(unit.num_nodes):
            here = node_of == node
            taken = np.zeros(num_sources, np.int64)
            np.add.at(taken, table.source_rank[here], sizes[here])
            ranks = unit.target.ranks[node * gpus_per_node : (node + 1) * gpus_per_node]
            yield NodeKind(
                nodes=tuple(first + node + unit.num_nodes * i for i in range(unit.count)),
                content=contents.setdefault(frozenset(nodes[node]), len(contents)),
                bytes_from=tuple(int(size) for size in taken),
                gpu_bytes=tuple(_held_bytes([rank], weight_bytes) for rank in ranks),
            )
        first += unit.num_nodes * unit.count


def _held_bytes(ranks: Sequence[RankLayout], weight_bytes: int) -> int:
    return sum(
        math.prod(storage.shape) * element_bytes(storage.dtype, weight_bytes)
        for rank in ranks
        for storage in rank.storages
    )


def _needs(unit: FleetUnit, gpus_per_node: int, weight_bytes: int) -> list[Needs]:
    """Return the bytes of each distinct box that each node of a unit needs."""
    nodes: list[Needs] = [{} for _ in range(unit.num_nodes)]
    seen: set[tuple[int, int]] = set()  # engines of one unit share their ranks' layouts
    for rank, held in enumerate(unit.target.ranks):
        node = rank // gpus_per_node
        if (node, id(held)) in seen:
            continue
        seen.add((node, id(held)))
        sizes = {s.name: element_bytes(s.dtype, weight_bytes) for s in held.storages}
        for tile in held.tiles:
            size = tile.box.num_elements * sizes[tile.storage]
            nodes[node][tile.parameter, tile.box] = size
    return nodes
