"""Every element arrives over gloo on every random topology, and all processes plan the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from npr_megatron.weights.executors.process_group import exchange
from npr_megatron.weights.plans.plan import plan_transfer
from npr_megatron.weights.storages import empty_storages
from tests.distributed.harness import run_ranks
from tests.thorough import parts
from tests.unit.weights.oracles import (
    Topology,
    element_ids,
    num_different,
    source_storages,
    target_storages,
)
from tests.unit.weights.sample import nodes_of, sample

WORLD_SIZE = 2
NUM_SHARDS, NUM_USUAL = 4, 1
MESSAGE_BYTES = (400, 2**20, 4000, 2**20)


def push(rank: int, world_size: int, init_method: str, topologies: list[Topology]):
    """Exchange every topology; return the plans' ids and in which ones elements differ here."""
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    plan_ids, wrong = [], []
    for number, drawn in enumerate(topologies):
        topology = replace(drawn)  # a fresh object: thousands of layouts would stay in memory
        nodes = nodes_of(topology, number)
        plan = plan_transfer(topology.source, topology.target, target_nodes=nodes)
        plan_ids.append(plan.plan_id)
        if not arrives(plan, topology, rank, MESSAGE_BYTES[number % len(MESSAGE_BYTES)]):
            wrong.append(repr(topology))
    dist.destroy_process_group()
    return plan_ids, wrong


def arrives(plan, topology: Topology, process: int, message_bytes: int) -> bool:
    """Whether all target ranks of this process get what they should; ranks are dealt in turn."""
    sources = [rank % WORLD_SIZE for rank in range(len(topology.source.ranks))]
    targets = [(rank + 1) % WORLD_SIZE for rank in range(len(topology.target.ranks))]
    ids = element_ids(topology.model)
    held, expected = source_storages(topology, ids), target_storages(topology, ids)
    here = [rank for rank, owner in enumerate(targets) if owner == process]
    arrived = {rank: empty_storages(topology.target.ranks[rank], torch.int64) for rank in here}
    exchange(
        plan,
        source_processes=sources,
        target_processes=targets,
        sources={rank: held[rank] for rank, owner in enumerate(sources) if owner == process},
        targets=arrived,
        dtype=torch.int64,
        process_group=dist.group.WORLD,
        timeout_s=60.0,
        message_bytes=message_bytes,
    )
    return num_different([arrived[rank] for rank in here], [expected[rank] for rank in here]) == 0


@pytest.mark.parametrize("shard", parts(NUM_SHARDS, NUM_USUAL))
def test_every_element_arrives_over_gloo_and_every_process_makes_the_same_plan(shard, tmp_path):
    topologies = list(sample()[shard::NUM_SHARDS])
    results = run_ranks(push, WORLD_SIZE, tmp_path, topologies, timeout_s=900)
    plan_ids, wrong = zip(*results, strict=True)
    assert plan_ids[0] == plan_ids[1]
    assert [*wrong[0], *wrong[1]] == []
    assert len(set(plan_ids[0])) > 0.9 * len(topologies)
