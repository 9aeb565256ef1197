"""A thousand pushes through shared memory leave nothing behind: memory, descriptors, files."""

from __future__ import annotations

import gc
import os

import psutil
import torch

from npr_megatron.config.model import InitConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.checkpoints.hf import random_init
from npr_megatron.weights.executors.shared_memory import Publisher, Receiver
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.storages import empty_storages
from tests.unit.weights.oracles import tiny_model, trainer_storages

MODEL = tiny_model(num_hidden_layers=1)
PARALLEL = ParallelConfig(tp_size=2)
SOURCE, ENGINE = trainer_layout(MODEL, PARALLEL), engine_layout(MODEL)
NUM_PUSHES = 1000
RESTART_EVERY = 100
LATE_JOINER_EVERY = 50
SLACK_BYTES = 8 * 2**20
"""For the allocator; mappings and descriptors are counted exactly."""


def held_by_this_process() -> tuple[int, int, int]:
    """Resident bytes, open descriptors, mapped regions."""
    gc.collect()
    process = psutil.Process()
    mapped = len(process.memory_maps(grouped=False))
    return process.memory_info().rss, len(os.listdir("/proc/self/fd")), mapped


def open_publishers(folder) -> list[Publisher]:
    ranks = range(len(SOURCE.ranks))
    return [Publisher(SOURCE, r, torch.float32, run_id="soak", arena_dir=folder) for r in ranks]


def test_a_thousand_pushes_leave_nothing_behind(tmp_path):
    """The trainer restarts now and then, late joiners come and go, one receiver stays."""
    storages = trainer_storages(MODEL, PARALLEL, random_init(MODEL, InitConfig(), 1))
    into = empty_storages(ENGINE.ranks[0], torch.float32)
    descriptors_at_start = held_by_this_process()[1]
    receiver, publishers = Receiver(SOURCE, ENGINE), open_publishers(tmp_path)
    arena_bytes = sum(path.stat().st_size for path in tmp_path.iterdir())
    for version in range(NUM_PUSHES):
        if version % RESTART_EVERY == RESTART_EVERY - 1:
            for publisher in publishers:
                publisher.close()
            publishers = open_publishers(tmp_path)
        for held in storages:
            held["decoder.final_layernorm.weight"].fill_(version)
        parts = [p.publish(version, s) for p, s in zip(publishers, storages, strict=True)]
        publication = Publication.assemble(parts)
        receiver.pull(publication, into)
        assert float(into["norm.weight"][0]) == version
        if version % LATE_JOINER_EVERY == 0:
            Receiver(SOURCE, ENGINE).pull(publication, into)
        if version == NUM_PUSHES // 10:
            before = held_by_this_process()
            assert sum(path.stat().st_size for path in tmp_path.iterdir()) == arena_bytes
    after = held_by_this_process()
    assert after[0] - before[0] < SLACK_BYTES
    assert after[1:] == before[1:]
    for publisher in publishers:
        publisher.close()
    receiver.close()
    assert list(tmp_path.iterdir()) == []
    del publisher, publishers
    assert held_by_this_process()[1] == descriptors_at_start
