"""``npr weights plan``: what a push would move, and how long it would take. No GPU, no weights."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from npr_megatron.cli.options import Json
from npr_megatron.cli.weights.plan_tables import print_forecast
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
from npr_megatron.errors import LayoutError
from npr_megatron.planning.fleet_plan import FleetPlan, plan_fleet
from npr_megatron.planning.forecast import forecast
from npr_megatron.weights.verify import verify_transfer


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
    as_json: Json = False,
) -> None:
    """Say what a push of weights moves where, and how long it takes on a described cluster.

    Needs no GPU and no weights. Times are predictions from closed forms for nodes of eight H100s;
    describe others with --set or --cluster. Keys are those of the cluster in --json.

    Examples:

      npr weights plan qwen3-4b --trainer tp2,dp4 --engines 64

      npr weights plan qwen3-235b-a22b --trainer tp4,pp2,dp8,ep8,etp1 --engine tp8,ep8 --engines 512

      npr weights plan models/my-model --trainer run.toml --dtype fp8 --set nic_gb_per_s=22
    """
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
            _require_proven(fleet)
        result = forecast(fleet, request.dtype, cluster, max_depth)

    if as_json:
        described = {
            "model": model,
            "dtype": request.dtype,
            "trainer": {**request.parallel.model_dump(), "gpus": request.parallel.world_size},
            "engine": {"tp_size": request.engine_tp, "ep_size": request.engine_ep},
            "engines": engines,
            "cluster": cluster.model_dump(),
            "is_proven": verify,
        }
        print(json.dumps({**described, **result.as_json()}))
    else:
        print_forecast(Console(), model, request, result, is_proven=verify)


def _require_proven(fleet: FleetPlan) -> None:
    for unit in fleet.units:
        if problems := verify_transfer(unit.plan, fleet.source, unit.target):
            raise LayoutError(
                f"the plan is wrong in {len(problems)} places, first: {problems[0]}; "
                "report this with the command you gave"
            )
