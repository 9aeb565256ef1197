"""The processes of a case: trainer ranks that publish, replicas that decode.

The weights of a version follow from its number, so everybody can tell what a version must be.
"""

from __future__ import annotations

import os
import resource
from functools import lru_cache
from pathlib import Path

import torch

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import InitConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.rollout.replica import Replica, ReplicaSpec
from npr_megatron.weights.checkpoints.hf import random_init
from npr_megatron.weights.executors.shared_memory import Publisher
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.publication import RankPublication
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles
from npr_megatron.weights.tiles import Layout
from tests.chaos.lines import serve
from tests.engines import TINY
from tests.structures import SMALL

MODEL = TINY
SOURCE = trainer_layout(MODEL, ParallelConfig(tp_size=2))
NUM_SOURCES = len(SOURCE.ranks)
RUN_ID = "chaos"


@lru_cache(maxsize=4)
def storages_of(version: int, layout: Layout, rank: int) -> dict[str, torch.Tensor]:
    """What ``rank`` of ``layout`` holds of the weights of ``version``."""
    storages = empty_storages(layout.ranks[rank], torch.float32)
    # embeddings wide enough that versions differ clearly in what they say
    weights = random_init(MODEL, InitConfig(embedding_std=0.5), seed=version)
    load_tiles(layout.ranks[rank], box_reader(weights), storages)
    return storages


def engine_weights(version: int) -> dict[str, torch.Tensor]:
    """What an engine of ``version`` holds."""
    return storages_of(version, engine_layout(MODEL), 0)


class Source:
    """One trainer rank."""

    def __init__(self, rank: int, arena_dir: Path) -> None:
        self._rank = rank
        self._arena_dir = arena_dir
        self._publisher: Publisher | None = None

    def publish(self, version: int) -> RankPublication:
        """Publish this rank's part of ``version``."""
        if self._publisher is None:
            self._publisher = Publisher(
                SOURCE, self._rank, torch.float32, run_id=RUN_ID, arena_dir=self._arena_dir
            )
        return self._publisher.publish(version, storages_of(version, SOURCE, self._rank))

    def limit_files(self, num_bytes: int) -> None:
        """Let no file of this process grow beyond ``num_bytes``; -1 lifts the limit."""
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))


class ServedReplica(Replica):
    """A replica that can be told from its predecessor in the same seat."""

    def pid(self) -> int:
        """Return the process that answers."""
        return os.getpid()


def source_process(rank: int, folder: Path, file_limit: int) -> None:
    """Run a trainer rank until killed."""
    source = Source(rank, folder / "arenas")
    source.limit_files(file_limit)
    serve(source, source_address(folder, rank))


def replica_process(index: int, folder: Path) -> None:
    """Run a replica until killed."""
    torch.set_num_threads(1)
    spec = ReplicaSpec(
        model=MODEL,
        engine=EngineConfig(num_kv_slots=256, max_running=4),
        vocabulary=SMALL,
        source=SOURCE,
        device="cpu",
    )
    replica = ServedReplica(spec)
    replica.start()
    serve(replica, replica_address(folder, index))


def source_address(folder: Path, rank: int) -> Path:
    """Return where a trainer rank answers."""
    return folder / f"source{rank}"


def replica_address(folder: Path, index: int) -> Path:
    """Return where the replica in a seat answers."""
    return folder / f"replica{index}"
