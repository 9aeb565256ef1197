"""Measure the moving of weights against what this machine can do, in one run.

    python tools/bench_weights.py
    python tools/bench_weights.py --layers 8 --repeats 9 --json

Most figures are ratios of two measurements taken in turns, of which the best of ``--repeats``
counts: the rest measures who else was busy. Copies are timed in CPU seconds of one thread (user and
kernel), what waits for others (messages, disks, GPUs) by the clock. The digest and the fixed cost
of a push are medians of CPU seconds. The model has the shape of Qwen3-4B with fewer layers and a
smaller vocabulary; the smaller ``--hidden``, the shorter the runs that column slices consist of.
Bars are what this project promises; MISS means that this run fell short.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from bench_figures import Figure, bests, medians, table_of
from rich.console import Console

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.planning.models import model_of
from npr_megatron.weights.box import Box
from npr_megatron.weights.digest import digest_box
from npr_megatron.weights.executors.arena import Arena
from npr_megatron.weights.executors.cuda_ipc import DevicePublisher, DeviceReceiver
from npr_megatron.weights.executors.disk import DiskReceiver, seal, write_shard
from npr_megatron.weights.executors.inproc import RankStorages, moves_of, run_moves
from npr_megatron.weights.executors.point_to_point import InFlight, Transfer
from npr_megatron.weights.executors.process_group import Exchange
from npr_megatron.weights.executors.shared_memory import Publisher, Receiver
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.plans.copies import Copy
from npr_megatron.weights.plans.plan import TransferPlan, plan_transfer
from npr_megatron.weights.proof.verify import verify_transfer
from npr_megatron.weights.publication import Publication, RankPublication
from npr_megatron.weights.quantise import quantise
from npr_megatron.weights.storages import empty_storages
from npr_megatron.weights.tiles import Layout

BF16 = torch.bfloat16
CUTS = ((2, 1), (1, 2), (4, 2), (8, 1))
"""Tensor-parallel sizes of trainer and engine."""
MESSAGE_BYTES = 16 * 2**20


def main() -> None:
    """Measure everything, print one table or one JSON list."""
    asked = _arguments()
    torch.set_num_threads(1)
    model = _model(asked.layers, asked.hidden)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(dir=asked.arena_dir) as arenas:
        figures += shared_memory_figures(model, asked.repeats, arenas)
        figures += fixed_cost_figures(asked.repeats, arenas)
    figures += gloo_figures(model, asked.repeats)
    figures += digest_figures(asked.hidden, asked.repeats)
    figures += planning_figures(asked.planned_model)
    with tempfile.TemporaryDirectory(dir=asked.disk_dir) as folder:
        figures += disk_figures(model, asked.repeats, Path(folder))
    if torch.cuda.is_available():
        figures += cuda_figures(model, asked.repeats)
    if asked.json:
        rows = [{**asdict(figure), "verdict": figure.verdict} for figure in figures]
        print(json.dumps(rows, indent=1))
    else:
        Console().print(table_of("weights in motion", figures))


def shared_memory_figures(model: ModelConfig, repeats: int, arena_dir: str) -> list[Figure]:
    """Copies by plan, from mapped arenas to staging, against memcpy of equal bytes."""
    ratios: dict[str, dict[str, float]] = {"row": {}, "column": {}}
    for trainer_tp, engine_tp in CUTS:
        source = trainer_layout(model, ParallelConfig(tp_size=trainer_tp))
        target = engine_layout(model, engine_tp)
        staging = _storages(target)
        with ExitStack() as publishers:
            paths = [part.arena_path for part in _published(source, publishers, arena_dir)]
            arenas = [
                Arena(path, rank_layout, BF16)
                for path, rank_layout in zip(paths, source.ranks, strict=True)
            ]
            held = {rank: arena.slots.storages(0) for rank, arena in enumerate(arenas)}
            for kind, copies in _by_kind(plan_transfer(source, target)).items():
                ratio = _against_memcpy(copies, held, staging, repeats)
                ratios[kind][f"TP{trainer_tp}->TP{engine_tp} {ratio:.2f}"] = ratio
    bars = {"row": 0.7, "column": 0.4}
    return [
        Figure(
            f"shared memory / memcpy, {kind}-split, worst",
            min(found.values()),
            bar=bars[kind],
            detail=", ".join(found),
        )
        for kind, found in ratios.items()
    ]


def _published(layout: Layout, publishers: ExitStack, arena_dir: str) -> list[RankPublication]:
    """Publish version 0 of every rank; ``publishers`` closes the arenas."""
    parts: list[RankPublication] = []
    for rank, held in _storages(layout).items():
        publisher = Publisher(layout, rank, BF16, run_id="bench", arena_dir=arena_dir)
        publishers.callback(publisher.close)
        parts.append(publisher.publish(0, held))
    return parts


def _by_kind(plan: TransferPlan) -> dict[str, list[Copy]]:
    """Divide copies by how Megatron cuts the tensor: o_proj and down_proj along columns."""
    kinds: dict[str, list[Copy]] = {"row": [], "column": []}
    for copy in plan.copies:
        is_column = copy.target_storage.endswith(("o_proj.weight", "down_proj.weight"))
        kinds["column" if is_column else "row"].append(copy)
    return kinds


def _against_memcpy(
    copies: Sequence[Copy], held: RankStorages, staging: RankStorages, repeats: int
) -> float:
    moves = moves_of(copies)  # as a receiver does once, before its first pull
    flat = torch.ones(sum(copy.num_elements for copy in copies), dtype=BF16)
    other = torch.ones_like(flat)
    parts = (lambda: run_moves(moves, held, staging), lambda: other.copy_(flat))
    by_plan, by_memcpy = bests(parts, repeats, time.process_time)
    return by_memcpy / by_plan


def fixed_cost_figures(repeats: int, arena_dir: str) -> list[Figure]:
    """A push of a model of 28 layers and next to no bytes: publish, pull, both digests."""
    model = _model(28, 16)
    source, target = trainer_layout(model, ParallelConfig()), engine_layout(model)
    held, staging = _storages(source)[0], _storages(target)[0]
    publisher = Publisher(source, 0, BF16, run_id="fixed", arena_dir=arena_dir)
    receiver, versions = Receiver(source, target), count()

    def push() -> None:
        part = publisher.publish(next(versions), held)
        receiver.pull(Publication.assemble([part]), staging)

    (seconds,) = medians((push,), 4 * repeats)
    publisher.close()
    num_tensors = len(target.ranks[0].tiles)
    return [Figure("fixed cost of a push", seconds * 1e3, "ms", 20, True, f"{num_tensors} tensors")]


def gloo_figures(model: ModelConfig, repeats: int) -> list[Figure]:
    """Messages by plan between two processes against one message of equal bytes."""
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.json"
        multiprocessing.spawn(_gloo_process, (model, repeats, folder, str(answers)), nprocs=2)
        found = json.loads(answers.read_text())
    worst = min(found, key=lambda name: found[name]["ratio"])
    detail = ", ".join(f"{name} {figures['ratio']:.2f}" for name, figures in found.items())
    rates = [
        Figure(f"gloo, {what}", max(figures[key] for figures in found.values()), "GB/s")
        for what, key in (("messages of 16 MiB", "parts_gbs"), ("one message", "whole_gbs"))
    ]
    ratio = found[worst]["ratio"]
    name = "gloo, by plan / messages of 16 MiB, worst"
    return [*rates, Figure(name, ratio, bar=0.75, detail=detail)]


def _gloo_process(rank: int, model: ModelConfig, repeats: int, folder: str, answers: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found: dict[str, dict[str, float]] = {}
    for trainer_tp, engine_tp in CUTS:
        source = trainer_layout(model, ParallelConfig(tp_size=trainer_tp))
        target = engine_layout(model, engine_tp)
        plan = plan_transfer(source, target)
        flat = torch.ones(plan.num_elements * BF16.itemsize, dtype=torch.uint8)
        held = _storages(source) if rank == 0 else {}
        staging = _storages(target) if rank == 1 else {}

        transfer = Exchange(
            plan,
            source_processes=[0] * trainer_tp,
            target_processes=[1] * engine_tp,
            dtype=BF16,
            process_group=dist.group.WORLD,
        )
        by_plan = partial(transfer.run, held, staging, timeout_s=60)
        in_parts = partial(_send_flat, flat.split(MESSAGE_BYTES), rank)
        in_one = partial(_send_flat, [flat], rank)
        plan_s, parts_s, whole_s = bests((by_plan, in_parts, in_one), 2 * repeats, step_s)
        found[f"TP{trainer_tp}->TP{engine_tp}"] = {
            "ratio": parts_s / plan_s,
            "parts_gbs": flat.nbytes / parts_s / 1e9,
            "whole_gbs": flat.nbytes / whole_s / 1e9,
        }
    if rank == 0:
        Path(answers).write_text(json.dumps(found))
    dist.destroy_process_group()


def _send_flat(parts: Sequence[torch.Tensor], rank: int) -> None:
    """Send ``parts`` from process 0 to process 1, all posted at once."""
    transfers = [Transfer(1 - rank, part, tag, rank == 0) for tag, part in enumerate(parts)]
    InFlight(transfers, dist.group.WORLD).wait(60)


def digest_figures(hidden: int, repeats: int) -> list[Figure]:
    """Bytes a second that one core digests."""
    shape = (4 * hidden, 4 * hidden)
    words = torch.randint(0, 100, shape)
    figures: list[Figure] = []
    for dtype in (torch.float32, BF16, torch.float8_e4m3fn):
        values = words.to(dtype)
        (seconds,) = medians((partial(digest_box, "p", Box((0, 0), shape), values),), repeats)
        name = str(dtype).removeprefix("torch.")
        figures.append(Figure(f"digest, {name}", values.nbytes / seconds / 1e9, "GB/s", 1.0))
    return figures


def planning_figures(name: str) -> list[Figure]:
    """Declare, plan and prove a push from 64 trainer GPUs to an engine of 8, once."""
    model = model_of(name)
    experts = {} if model.moe is None else {"ep_size": 8, "etp_size": 1}
    parallel = ParallelConfig(tp_size=4, pp_size=2, dp_size=8, **experts)
    started = time.perf_counter()
    source = trainer_layout(model, parallel)
    target = engine_layout(model, tp_size=8, ep_size=1 if model.moe is None else 8)
    declared = time.perf_counter()
    plan = plan_transfer(source, target)
    planned = time.perf_counter()
    problems = verify_transfer(plan, source, target)
    proven = time.perf_counter()
    if problems:
        raise SystemExit("the plan is wrong:\n" + "\n".join(problems))
    detail = f"{len(plan.copy_table)} copies; layouts {declared - started:.1f} s"
    detail += f", proof {proven - planned:.1f} s"
    return [Figure(f"planning {name}, 64 GPUs -> TP8", planned - declared, "s", 5, True, detail)]


def disk_figures(model: ModelConfig, repeats: int, folder: Path) -> list[Figure]:
    """A version written and read by plan, against plain files of equal bytes."""
    source = trainer_layout(model, ParallelConfig(tp_size=2))
    target = engine_layout(model)
    held, staging, versions = _storages(source), _storages(target)[0], count()
    receiver, plain = DiskReceiver(source, target), folder / "plain"
    content = torch.ones(
        sum(t.nbytes for s in held.values() for t in s.values()), dtype=torch.uint8
    )

    def write() -> Path:
        version = next(versions)
        root = folder / "versions"
        parts = [write_shard(root, source, rank, version, held[rank], BF16) for rank in held]
        return seal(root, parts, keep_last=1)

    def write_plain() -> None:
        with plain.open("wb") as file:
            file.write(content.numpy().data)
            file.flush()
            os.fsync(file.fileno())

    def read_plain() -> None:
        with plain.open("rb", buffering=0) as file:
            file.readinto(content.numpy().data)

    by_version, by_plain = bests((write, write_plain), repeats)
    newest = write()
    reading, reading_plain = bests((lambda: receiver.pull(newest, staging), read_plain), repeats)
    return [
        Figure("disk, version written / plain file", by_plain / by_version, detail="with SHA-256"),
        Figure("disk, version pulled / plain read", reading_plain / reading, detail="with digest"),
    ]


def cuda_figures(model: ModelConfig, repeats: int) -> list[Figure]:
    """CUDA IPC and the FP8 cast as fractions of the bandwidth of a device copy."""
    source = trainer_layout(model, ParallelConfig())
    publisher = DevicePublisher(source, 0, BF16, device=torch.device("cuda"))
    held = {name: tensor.cuda() for name, tensor in _storages(source)[0].items()}
    publication = Publication.assemble([publisher.publish(0, held)])
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        multiprocessing.spawn(_ipc_process, (model, publication, repeats, str(answer)), nprocs=1)
        ipc = float(answer.read_text())
    values = torch.randn(8192, 8192, device="cuda", dtype=BF16)
    other = torch.empty_like(values)
    cast_s, copy_s = bests(
        (lambda: quantise(values, 128, "exact"), lambda: other.copy_(values)), repeats, device_s
    )
    moved = values.nbytes * 1.5  # bf16 read, fp8 written; the copy reads and writes bf16
    return [
        Figure("CUDA IPC pull / device copy", ipc, detail="with digest"),
        Figure("FP8 cast / device copy", moved / cast_s / (2 * values.nbytes / copy_s)),
    ]


def _ipc_process(
    _: int, model: ModelConfig, publication: Publication, repeats: int, answer: str
) -> None:
    source, target = trainer_layout(model, ParallelConfig()), engine_layout(model)
    staging = {name: tensor.cuda() for name, tensor in _storages(target)[0].items()}
    receiver = DeviceReceiver(source, target)
    flat = torch.zeros(sum(t.nbytes for t in staging.values()), dtype=torch.uint8, device="cuda")
    other = torch.empty_like(flat)
    pull_s, copy_s = bests(
        (lambda: receiver.pull(publication, staging), lambda: other.copy_(flat)), repeats, device_s
    )
    Path(answer).write_text(str(copy_s / pull_s))
    receiver.close()


def step_s() -> float:
    """Seconds on the clock when all processes are here."""
    dist.barrier()
    return time.perf_counter()


def device_s() -> float:
    """Seconds on the clock when the GPU has done all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description="Measure the moving of weights.")
    options.add_argument("--layers", type=int, default=2)
    options.add_argument("--hidden", type=int, default=2560)
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--planned-model", default="qwen3-235b-a22b")
    options.add_argument("--arena-dir", default="/dev/shm")
    options.add_argument("--disk-dir", default=None, help="default: the folder of temporary files")
    options.add_argument("--json", action="store_true")
    return options.parse_args()


def _model(layers: int, hidden: int) -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=max(1, hidden // 20),
        intermediate_size=max(8, hidden * 19 // 5 // 64 * 64),
        vocab_size=8 * hidden,
    )


def _storages(layout: Layout) -> dict[int, dict[str, torch.Tensor]]:
    """Return written storages: what was never written is read from one cached page of zeros."""
    held = {
        rank: empty_storages(rank_layout, BF16) for rank, rank_layout in enumerate(layout.ranks)
    }
    for storages in held.values():
        for tensor in storages.values():
            tensor.fill_(0.5)
    return held


if __name__ == "__main__":
    main()
