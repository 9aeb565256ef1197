"""A forecast as tables for people: what moves, how long it takes, how long decoding pauses."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from npr_megatron.planning.forecast import Forecast
from npr_megatron.planning.push_request import PushRequest

_SMALLEST_ROW_FRAC = 1e-3
"""Movements below this share of the bytes are told together."""


def print_forecast(
    console: Console, name: str, request: PushRequest, result: Forecast, *, is_proven: bool
) -> None:
    """Print a forecast, widest view first."""
    volume = result.volume
    console.print(
        f"[bold]{name}[/bold] in {request.dtype}, {in_bytes(volume.model_bytes)}: "
        f"{counted(volume.num_source_gpus, 'trainer GPU')} -> "
        f"{counted(request.num_engines, 'engine')} of tp {request.engine_tp} ep "
        f"{request.engine_ep} = {counted(request.num_fleet_gpus, 'GPU')} on "
        f"{counted(volume.num_nodes, 'node')}\n",
        soft_wrap=True,
    )
    console.print(movement_table(result))
    for line in _bytes_lines(result, is_proven=is_proven):
        console.print(f"  {line}", soft_wrap=True)
    console.print()
    console.print(time_table(result))
    console.print()
    console.print(pause_table(result))


def movement_table(result: Forecast) -> Table:
    """Return what one unit of the fleet receives, by the names of storages."""
    engines, nodes = result.engines_per_unit, result.nodes_per_unit
    receive = "receives" if nodes == 1 else "receive"
    table = _titled(f"What {counted(nodes, 'node')} of {counted(engines, 'engine')} {receive}")
    table.add_column("into", style="cyan", overflow="fold")
    table.add_column("from", overflow="fold")
    table.add_column("over", no_wrap=True)
    for name in ("copies", "bytes", "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    total = sum(one.num_bytes for one in result.movements)
    small = [one for one in result.movements if one.num_bytes < total * _SMALLEST_ROW_FRAC]
    for one in result.movements:
        if one not in small:
            link = "NIC" if one.crosses_nodes else "NVLink"
            sizes = f"{one.num_copies:,}", in_bytes(one.num_bytes), in_bytes(one.largest_bytes)
            table.add_row(_plain(one.target), _plain(one.source), link, *sizes)
    if small:
        sizes = (
            f"{sum(one.num_copies for one in small):,}",
            in_bytes(sum(one.num_bytes for one in small)),
            in_bytes(max(one.largest_bytes for one in small)),
        )
        table.add_row(counted(len(small), "smaller kind"), "", "", *sizes)
    return table


def time_table(result: Forecast) -> Table:
    """Return floor, direct and relayed times with what bounds them."""
    table = _titled("How long a push takes")
    table.add_column("way", style="cyan", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("bounded by")
    table.add_column("along")
    floors = {
        "node ingress at line rate": result.floor.node_ingress_s,
        "GPU fill at line rate": result.floor.gpu_fill_s,
        "NVLink": result.floor.nvlink_s,
        "source egress at line rate": result.floor.source_egress_s,
        "all NICs together at line rate": result.floor.all_nics_s,
        "packing at the source": result.floor.source_pack_s,
    }
    relaying = result.relaying
    chains = (
        f"{counted(relaying.num_chains, 'chain')} of {counted(relaying.depth, 'node')}, "
        f"chunks of {in_bytes(relaying.chunk_bytes)}"
    )
    floor, direct, relay = result.floor, result.direct, result.relay
    table.add_row("floor", in_time(floor.seconds), max(floors, key=lambda key: floors[key]), "")
    table.add_row("direct", in_time(direct.seconds), direct.bottleneck, "source to every node")
    table.add_row("relayed", in_time(relay.seconds), relay.bottleneck, chains)
    return table


def pause_table(result: Forecast) -> Table:
    """Return the pause and the memory of each way to hold the next version."""
    table = _titled("Where the next version waits, and how long decoding pauses for it")
    table.add_column("where", style="cyan", no_wrap=True)
    table.add_column("pause", justify="right", no_wrap=True)
    table.add_column("memory per GPU", justify="right")
    table.add_column("fits", no_wrap=True)
    for pause in result.pauses:
        spare = f"{in_bytes(pause.host_bytes)} of host" if pause.host_bytes else "none"
        spare = in_bytes(pause.gpu_bytes) if pause.gpu_bytes else spare
        fits = "yes" if pause.is_feasible else "no"
        table.add_row(pause.mode, in_time(pause.seconds), spare, fits)
    return table


def in_bytes(size: float) -> str:
    """Return a size with three digits and a decimal unit: ``58.9 GB``."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    unit = 0
    while size >= 999.5 and unit < len(units) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.0f} B" if unit == 0 else f"{_three_digits(size)} {units[unit]}"


def in_time(seconds: float) -> str:
    """Return a time with three digits: ``1.44 s``, ``45.4 ms``."""
    if seconds == 0:
        return "0 s"
    if seconds < 0.9995:
        return f"{_three_digits(seconds * 1e3)} ms"
    return f"{_three_digits(seconds)} s"


def _bytes_lines(result: Forecast, *, is_proven: bool) -> list[str]:
    mean = sum(result.egress) / len(result.egress)
    proof = "proven by the verifier" if is_proven else "not verified"
    return [
        f"plan {result.plan_ids[0][:12]}, {proof}",
        f"{in_bytes(result.volume.wire_bytes)} cross into the fleet's nodes = "
        f"{result.wire_ratio:.3f} x the minimum",
        f"a trainer GPU sends {in_bytes(mean)} per replica, the busiest "
        f"{result.imbalance:.3f} x that; an engine GPU holds {in_bytes(result.volume.gpu_bytes)}",
    ]


def _three_digits(number: float) -> str:
    return (
        f"{number:.2f}"
        if number < 9.995
        else f"{number:.1f}"
        if number < 99.95
        else f"{number:,.0f}"
    )


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 node``, ``4,096 GPUs``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _titled(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold")


def _plain(name: str) -> str:
    """Return a storage's name without what all names share."""
    for prefix in ("model.", "decoder.", "layers.*."):
        name = name.removeprefix(prefix)
    return name.removesuffix(".weight")
