"""Arguments with which ``plan`` and ``simulate`` describe a push, said once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from npr_megatron.errors import ConfigError, InputError
from npr_megatron.planning.cluster import HardwareConfig, read_cluster
from npr_megatron.planning.models import model_of
from npr_megatron.planning.push_request import PushRequest, read_engine, read_trainer


class Dtype(StrEnum):
    """What the fleet serves."""

    BF16 = "bf16"
    FP8 = "fp8"
    FP32 = "fp32"


class Dialect(StrEnum):
    """Whose names and padding the engines use."""

    EMBEDDED = "embedded"
    SGLANG = "sglang"


ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A known model, or an HF folder with config.json.")
]
Trainer = Annotated[
    str,
    typer.Option(metavar="SIZES", help="tp, pp, vpp, cp, dp, ep, etp: tp4,pp2,dp8; or RUN.toml."),
]
Engine = Annotated[str, typer.Option(metavar="SIZES", help="tp and ep of one engine: tp8,ep8.")]
Engines = Annotated[int, typer.Option(min=1, help="Engines in the fleet.")]
ServedAs = Annotated[Dtype, typer.Option(help="What the engines hold; fp8 in blocks of 128.")]
EngineDialect = Annotated[Dialect, typer.Option(help="Names and padding of the engines.")]
ClusterFile = Annotated[
    Path | None, typer.Option("--cluster", help="TOML file with rates and sizes of nodes.")
]
ClusterValues = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One value of the cluster; may be repeated."),
]
MaxDepth = Annotated[
    int | None, typer.Option(min=1, help="Longest relay chain; default: as the source allows.")
]


def read_push(
    model: str,
    trainer: str,
    engine: str,
    *,
    num_engines: int,
    dtype: Dtype,
    dialect: Dialect,
    cluster_file: Path | None,
    cluster_values: Sequence[str],
) -> tuple[PushRequest, HardwareConfig]:
    """Return what the arguments describe, or raise ConfigError with every problem in them."""
    problems: list[str] = []

    def read(reader: Callable[[], Any]) -> Any:
        try:
            return reader()
        except ConfigError as error:
            problems.extend(error.problems)
        except InputError as error:
            problems.append(str(error))

    shape = read(lambda: model_of(model))
    parallel = read(lambda: read_trainer(trainer))
    sizes = read(lambda: read_engine(engine))
    cluster = read(lambda: read_cluster(cluster_file, _pairs(cluster_values)))
    if problems:
        raise ConfigError(problems)
    request = PushRequest(
        model=shape,
        parallel=parallel,
        engine_tp=sizes[0],
        engine_ep=sizes[1],
        num_engines=num_engines,
        engine=dialect.value,
        dtype=dtype.value,
    )
    return request, cluster


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    wrong = [text for text in texts if "=" not in text]
    if wrong:
        raise ConfigError(
            [f"--set {text!r} has no '='; write for example nic_gb_per_s=22.5" for text in wrong]
        )
    return {key.strip(): value for key, _, value in (text.partition("=") for text in texts)}
