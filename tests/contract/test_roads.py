"""Whatever road new weights come by, every engine takes them into its shadow and serves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from npr_megatron.config.training import ParallelConfig
from npr_megatron.engine.backends import storages_of
from npr_megatron.engine.interface import Engine
from npr_megatron.weights.executors.disk import DiskReceiver, seal, write_shard
from npr_megatron.weights.executors.process_group import exchange
from npr_megatron.weights.executors.shared_memory import Receiver
from npr_megatron.weights.layouts import trainer_layout
from npr_megatron.weights.plans.plan import plan_transfer
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles
from npr_megatron.weights.tiles import Layout
from tests.contract.backends import MODEL, ROUNDING, Backend, decode
from tests.contract.test_events import trees
from tests.distributed.harness import forks
from tests.engines import assert_same_trajectory, random_weights
from tests.parity.hf_reference import hf_model
from tests.publishing import published

TRAINER = trainer_layout(MODEL, ParallelConfig(tp_size=2, pp_size=2))
TIMEOUT_S = 60.0
Weights = Mapping[str, Tensor]
Road = Callable[[Weights, Layout, dict[str, Tensor], Path], None]
"""(canonical weights, layout of the shadow, the shadow to fill, a folder)"""


def storages_of_trainer(tensors: Weights) -> dict[int, dict[str, Tensor]]:
    """Return what each rank of the trainer holds."""
    held: dict[int, dict[str, Tensor]] = {}
    for number, rank in enumerate(TRAINER.ranks):
        held[number] = empty_storages(rank, torch.float32)
        load_tiles(rank, box_reader(tensors), held[number])
    return held


def by_shared_memory(tensors: Weights, target: Layout, into: dict[str, Tensor], at: Path) -> None:
    with published(TRAINER, tensors, 1, at) as publication:
        receiver = Receiver(TRAINER, target)
        receiver.pull(publication, into)
        receiver.close()


def from_disk(tensors: Weights, target: Layout, into: dict[str, Tensor], at: Path) -> None:
    records = [
        write_shard(at, TRAINER, rank, 1, storages, torch.float32)
        for rank, storages in storages_of_trainer(tensors).items()
    ]
    DiskReceiver(TRAINER, target).pull(seal(at, records, keep_last=1), into)


def by_messages(tensors: Weights, target: Layout, into: dict[str, Tensor], at: Path) -> None:
    sender = forks().Process(target=send, args=(dict(tensors), target, at))
    sender.start()
    try:
        take_part(1, {}, target, {0: into}, at)
    finally:
        sender.join(TIMEOUT_S)
    assert sender.exitcode == 0


def send(tensors: Weights, target: Layout, at: Path) -> None:
    """Be the trainer, all its ranks in one process."""
    take_part(0, storages_of_trainer(tensors), target, {}, at)


def take_part(
    process: int,
    sources: dict[int, dict[str, Tensor]],
    target: Layout,
    targets: dict[int, dict[str, Tensor]],
    at: Path,
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{at}/meeting", rank=process, world_size=2)
    try:
        world = dist.group.WORLD
        assert isinstance(world, dist.ProcessGroup)
        exchange(
            plan_transfer(TRAINER, target),
            source_processes=[0] * len(TRAINER.ranks),
            target_processes=[1],
            sources=sources,
            targets=targets,
            dtype=torch.float32,
            process_group=world,
            timeout_s=TIMEOUT_S,
        )
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("road", [by_shared_memory, from_disk, by_messages])
def test_weights_come_by_every_road(
    engine: Engine, backend: Backend, road: Road, tmp_path: Path
) -> None:
    asked = trees(backend, 2)
    backend.load(engine, random_weights(MODEL, 1), version=1)
    weights = random_weights(MODEL, 2)
    road(
        hf_model(MODEL, weights).state_dict(),
        storages_of(MODEL, backend.config),
        engine.staging(),
        tmp_path,
    )
    engine.seal()
    engine.commit(2)
    expected = backend.expected(asked, weights, 2)
    for pair in zip(decode(engine, asked), expected, strict=True):
        assert_same_trajectory(*pair, tolerance=ROUNDING)
