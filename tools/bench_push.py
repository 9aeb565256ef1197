"""Measure a weight push through shared memory against memcpy of equal bytes, in one run.

    python tools/bench_push.py --layers 4 --tp 2 --dtype bf16

The model has the shape of Qwen3-0.6B with fewer layers. One process with one thread plays all
trainer ranks and the engine, and CPU seconds are counted (user and kernel), so a busy machine
disturbs little. Times are medians of several pushes. Wire bytes over the fewest possible must be
1.000.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table

from npr_megatron.config.model import InitConfig, ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.arena import Arena
from npr_megatron.weights.digest import Census
from npr_megatron.weights.executors.inproc import copy_boxes
from npr_megatron.weights.executors.shared_memory import Publisher, Receiver
from npr_megatron.weights.hf import random_init
from npr_megatron.weights.layout import engine_layout, trainer_layout
from npr_megatron.weights.plan import plan_transfer
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    """Parse the command line, push, print."""
    options = argparse.ArgumentParser(description="Measure a weight push against memcpy.")
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--tp", type=int, default=2)
    options.add_argument("--pp", type=int, default=1)
    options.add_argument("--dp", type=int, default=1)
    options.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    options.add_argument("--pushes", type=int, default=5)
    options.add_argument("--arena-dir", default="/dev/shm")
    asked = options.parse_args()
    torch.set_num_threads(1)
    model = ModelConfig(
        num_hidden_layers=asked.layers,
        hidden_size=1024,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=32_768,
    )
    parallel = ParallelConfig(tp_size=asked.tp, pp_size=asked.pp, dp_size=asked.dp)
    with tempfile.TemporaryDirectory(dir=asked.arena_dir) as folder:
        measure(model, parallel, DTYPES[asked.dtype], asked.pushes, folder)


def measure(
    model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, num_pushes: int, folder: str
) -> None:
    """Push ``num_pushes`` times and print what each part took."""
    source, target = trainer_layout(model, parallel), engine_layout(model)
    ranks = range(len(source.ranks))
    read = box_reader(random_init(model, InitConfig(), seed=0))
    trainer = [empty_storages(rank, dtype) for rank in source.ranks]
    for rank in ranks:
        load_tiles(source.ranks[rank], read, trainer[rank])
    publishers = [
        Publisher(source, rank, dtype, run_id="bench", arena_dir=folder) for rank in ranks
    ]
    versions = iter(range(10**6))

    def publish() -> Publication:
        version = next(versions)
        return Publication.assemble([publishers[r].publish(version, trainer[r]) for r in ranks])

    plan, receiver = plan_transfer(source, target), Receiver(source, target)
    staging = empty_storages(target.ranks[0], dtype)
    publication = publish()
    arenas = {
        rank: Arena.open(publication.arena_paths[rank], source.ranks[rank], dtype).storages(0)
        for rank in ranks
    }
    census = Census(target)
    num_bytes = plan.num_elements * dtype.itemsize
    flat = torch.zeros(num_bytes, dtype=torch.uint8)
    other = torch.zeros_like(flat)
    parts: dict[str, Callable[[], object]] = {
        "memcpy of equal bytes": lambda: other.copy_(flat),
        "copies, arenas to staging": lambda: copy_boxes(plan.copies, arenas, {0: staging}),
        "digest of the staging": lambda: census.shares(0, staging),
        "publish, all ranks (copy and digest)": publish,
        "pull (copies and digest)": lambda: receiver.pull(publish(), staging),
    }
    seconds = {name: median_s(part, num_pushes) for name, part in parts.items()}
    # a pull needs a fresh publication, whose cost is taken off again
    seconds["pull (copies and digest)"] -= seconds["publish, all ranks (copy and digest)"]
    for publisher in publishers:
        publisher.close()
    report(f"{parallel}, {num_bytes / 1e6:.0f} MB, {len(plan.copies)} copies", seconds, num_bytes)
    fewest = sum(rank.num_elements for rank in target.ranks)
    Console().print(f"wire bytes / fewest bytes = {plan.num_elements / fewest:.3f}")


def median_s(part: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of ``part`` after one run to touch every page."""
    part()
    times: list[float] = []
    for _ in range(repeats):
        started = time.process_time()
        part()
        times.append(time.process_time() - started)
    return statistics.median(times)


def report(title: str, seconds: dict[str, float], num_bytes: int) -> None:
    """Print one row per part."""
    table = Table(title=title)
    columns: Sequence[str] = ("part", "ms", "GB/s", "memcpy / part")
    for name in columns:
        table.add_column(name, justify="left" if name == "part" else "right")
    memcpy_s = seconds["memcpy of equal bytes"]
    for name, taken in seconds.items():
        rate = num_bytes / taken / 1e9
        table.add_row(name, f"{taken * 1e3:.1f}", f"{rate:.1f}", f"{memcpy_s / taken:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
