"""``npr weights simulate``: play a push through with jitter, slow and dead nodes. No GPU."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from npr_megatron.cli.options import Json
from npr_megatron.cli.weights.push_options import (
    ClusterFile,
    ClusterValues,
    Dialect,
    Dtype,
    Engine,
    EngineDialect,
    Engines,
    MaxDepth,
    ModelName,
    ServedAs,
    Trainer,
    read_push,
)
from npr_megatron.errors import ConfigError


def simulate(
    model: ModelName,
    trainer: Trainer = "tp1",
    engine: Engine = "tp1",
    engines: Engines = 1,
    dtype: ServedAs = Dtype.BF16,
    dialect: EngineDialect = Dialect.EMBEDDED,
    jitter: Annotated[
        float, typer.Option(min=0.0, max=3.0, help="Spread of chunk times; 0.3 is 30 percent.")
    ] = 0.0,
    slow_nodes: Annotated[int, typer.Option(min=0, help="Nodes with slow NICs.")] = 0,
    slow_rate: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Their rate as a share of the others'.")
    ] = 0.5,
    dead_nodes: Annotated[int, typer.Option(min=0, help="Nodes that die during the push.")] = 0,
    detection: Annotated[
        float, typer.Option(min=0.0, help="Seconds until a death is noticed.")
    ] = 0.5,
    blind: Annotated[
        bool, typer.Option("--blind", help="Nobody measured which nodes are slow.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Chooses nodes, times and jitter.")] = 0,
    max_depth: MaxDepth = None,
    cluster_file: ClusterFile = None,
    cluster_values: ClusterValues = None,
    as_json: Json = False,
) -> None:
    """Play a push through on a fleet with jitter, slow nodes and dead nodes.

    Shows direct and relayed pushes beside their closed forms. Slow nodes stand last in their
    relay chains unless --blind; orphans of dead nodes continue from their nearest living ancestor.

    Examples:

      npr weights simulate qwen3-4b --trainer dp8 --engines 512 --jitter 0.3

      npr weights simulate qwen3-8b --trainer dp8 --engines 512 --slow-nodes 3
    """
    from npr_megatron.cli.weights.simulation_view import as_plain, play, show
    from npr_megatron.planning.conditions import draw_conditions
    from npr_megatron.planning.fleet_plan import plan_fleet
    from npr_megatron.planning.push_floor import relay_time

    request, cluster = read_push(
        model,
        trainer,
        engine,
        num_engines=engines,
        dtype=dtype,
        dialect=dialect,
        cluster_file=cluster_file,
        cluster_values=cluster_values or [],
    )
    with Console(stderr=True).status("simulating"):
        volume = plan_fleet(request, cluster).volume
        _require_nodes(volume.num_nodes, slow_nodes + dead_nodes)
        conditions = draw_conditions(
            volume.num_nodes,
            num_slow=slow_nodes,
            slow_rate=slow_rate,
            num_dead=dead_nodes,
            dead_within_s=relay_time(volume, cluster, max_depth).seconds,
            jitter=jitter,
            detection_s=detection,
            are_rates_known=not blind,
            seed=seed,
        )
        outcomes = play(volume, cluster, conditions, max_depth)
    if as_json:
        print(json.dumps(as_plain(model, volume, conditions, outcomes)))
    else:
        show(Console(), model, volume, conditions, outcomes)


def _require_nodes(num_nodes: int, num_disturbed: int) -> None:
    if num_disturbed > num_nodes:
        raise ConfigError(
            f"{num_disturbed} slow and dead nodes were asked for, the fleet has {num_nodes}; lower "
            "--slow-nodes or --dead-nodes, or raise --engines"
        )
