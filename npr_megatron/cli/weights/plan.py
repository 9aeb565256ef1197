"""``npr weights plan``: what a push would move, and how long it would take. No GPU, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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
from npr_megatron.planning.cluster import HardwareConfig
from npr_megatron.planning.push_request import PushRequest


def plan(
    model: ModelName,
    trainer: Trainer = "tp1",
    engine: Engine = "tp1",
    engines: Engines = 1,
    dtype: ServedAs = Dtype.BF16,
    dialect: EngineDialect = Dialect.EMBEDDED,
    cluster_file: ClusterFile = None,
    cluster_values: ClusterValues = None,
    max_depth: MaxDepth = None,
    verify: Annotated[
        bool, typer.Option(help="Prove the plan with the independent verifier.")
    ] = True,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Draw the time of a push over the fleet's size."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a push of weights moves where, and how long it takes on a described cluster.

    Needs no GPU and no weights. Times come from closed forms, for nodes of eight H100s unless
    --set or --cluster say otherwise; --json shows every key of a cluster.

    Examples:

      npr weights plan qwen3-4b --trainer tp2,dp4 --engines 64

      npr weights plan qwen3-32b --engine tp4 --trainer run.toml --dtype fp8

      npr weights plan my-model/ --engine tp8 --set nic_gb_per_s=22 --plot push.png
    """
    from npr_megatron.cli.weights.plan_chart import draw_sweep
    from npr_megatron.cli.weights.plan_tables import print_forecast
    from npr_megatron.planning.fleet_plan import plan_fleet, require_proven
    from npr_megatron.planning.fleet_sweep import sweep_fleet
    from npr_megatron.planning.forecast import forecast

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
    with Console(stderr=True).status("planning"):
        fleet = plan_fleet(request, cluster)
        if verify:
            require_proven(fleet)
        result = forecast(fleet, request.dtype, cluster, max_depth)
        if plot is not None:
            title = f"{model}, {dtype.value}, {len(fleet.source.ranks):,} trainer GPUs"
            points = sweep_fleet(fleet, cluster, max_depth)
            draw_sweep(plot, title, points, request.num_fleet_gpus)

    if as_json:
        described = _described(model, request, cluster)
        print(json.dumps({**described, "is_proven": verify, **result.as_json()}))
    else:
        print_forecast(Console(), model, request, result, is_proven=verify)
        if plot is not None:
            print(plot)


def _described(model: str, request: PushRequest, cluster: HardwareConfig) -> dict[str, Any]:
    return {
        "model": model,
        "dtype": request.dtype,
        "trainer": {**request.parallel.model_dump(), "gpus": request.parallel.world_size},
        "engine": {"tp_size": request.engine_tp, "ep_size": request.engine_ep},
        "engines": request.num_engines,
        "cluster": cluster.model_dump(),
    }
