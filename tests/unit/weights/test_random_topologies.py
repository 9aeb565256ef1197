"""Every element arrives, on every random topology, by the executors that need one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from npr_megatron.weights.executors.disk import DiskReceiver, read_manifest, seal, write_shard
from npr_megatron.weights.executors.inproc import execute
from npr_megatron.weights.executors.shared_memory import Publisher, Receiver
from npr_megatron.weights.plans.plan import TransferPlan, plan_transfer
from npr_megatron.weights.proof.verify import verify_transfer
from npr_megatron.weights.proof.wire_minimum import fewest_wire_bytes
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.storages import empty_storages
from npr_megatron.weights.tiles import Layout
from tests.thorough import parts
from tests.unit.weights.oracles import (
    Topology,
    by_rank,
    element_ids,
    num_different,
    source_storages,
    target_storages,
)
from tests.unit.weights.sample import LEAST, nodes_of, sample

NUM_SHARDS, NUM_USUAL = 8, 2


def numbered(shard: int) -> Iterator[tuple[int, Topology]]:
    # fresh objects: the sample itself must not keep thousands of layouts
    return ((n, replace(one)) for n, one in enumerate(sample()) if n % NUM_SHARDS == shard)


def frac(predicate) -> float:
    return sum(predicate(replace(one)) for one in sample()) / len(sample())


def test_the_sample_meets_its_quotas():
    assert len(sample()) >= LEAST
    assert frac(lambda one: one.parallel.tp_size > one.model.num_key_value_heads) >= 0.1
    assert frac(lambda one: one.engine_tp_size > one.model.num_key_value_heads) >= 0.1
    assert frac(is_split_specially) >= 0.3
    assert frac(lambda one: one.model.moe is not None and one.parallel.ep_size > 1) >= 0.1
    assert frac(has_experts_cut_twice) >= 0.05
    assert frac(lambda one: one.model.tie_word_embeddings) >= 0.1
    assert frac(has_padded_vocabulary) >= 0.1


def is_split_specially(topology: Topology) -> bool:
    parallel = topology.parallel
    return (
        parallel.vpp_size > 1
        or parallel.num_layers_in_first_stage is not None
        or parallel.pipeline_layout is not None
    )


def has_experts_cut_twice(topology: Topology) -> bool:
    parallel = topology.parallel
    etp = parallel.tp_size if parallel.etp_size is None else parallel.etp_size
    return topology.model.moe is not None and parallel.ep_size > 1 and etp > 1


def has_padded_vocabulary(topology: Topology) -> bool:
    vocabulary = {
        tile.box.stop[0]
        for rank in topology.source.ranks
        for tile in rank.tiles
        if tile.storage == "embedding.word_embeddings.weight"
    }
    rows = sum(
        storage.shape[0]
        for rank in topology.source.ranks[: topology.parallel.tp_size]
        for storage in rank.storages
        if storage.name == "embedding.word_embeddings.weight"
    )
    return rows > max(vocabulary)


def empty(layout: Layout):
    """Storages with 0, which is no element's id, everywhere."""
    return [empty_storages(rank, torch.int64) for rank in layout.ranks]


def planned(source: Layout, target: Layout, nodes: list[int] | None) -> TransferPlan:
    """A plan that is proven and moves what is counted to be the least."""
    plan = plan_transfer(source, target, target_nodes=nodes)
    assert verify_transfer(plan, source, target) == []
    least = fewest_wire_bytes(source, target, target_nodes=nodes)
    assert plan.wire_bytes(2) == sum(least.values())
    return plan


def in_process(topology: Topology, held, number: int, _folder: Path):
    plan = planned(topology.source, topology.target, nodes_of(topology, number))
    arrived = empty(topology.target)
    execute(plan, by_rank(held), by_rank(arrived))
    return arrived


def through_shared_memory(topology: Topology, held, number: int, folder: Path):
    publishers = [
        Publisher(topology.source, rank, torch.int64, run_id="random", arena_dir=folder)
        for rank in range(len(held))
    ]
    publication = Publication.assemble(
        [one.publish(number, mine) for one, mine in zip(publishers, held, strict=True)]
    )
    arrived = empty(topology.target)
    shares = []
    for rank, into in enumerate(arrived):
        receiver = Receiver(topology.source, topology.target, rank)
        shares.append(receiver.pull(publication, into))
        receiver.close()
    publication.check(shares)
    for publisher in publishers:
        publisher.close()
    return arrived


def from_disk(topology: Topology, held, number: int, folder: Path):
    records = [
        write_shard(folder / "disk", topology.source, rank, number, mine, torch.int64)
        for rank, mine in enumerate(held)
    ]
    sealed = seal(folder / "disk", records, keep_last=1)
    arrived = empty(topology.target)
    read_manifest(sealed).publication.check(
        DiskReceiver(topology.source, topology.target, rank).pull(sealed, into)
        for rank, into in enumerate(arrived)
    )
    return arrived


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of small files are made and synced."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)


@pytest.mark.parametrize("shard", parts(NUM_SHARDS, NUM_USUAL))
def test_every_element_arrives_and_comes_back(shard, folder):
    for number, topology in numbered(shard):
        ids = element_ids(topology.model)
        held, served = source_storages(topology, ids), target_storages(topology, ids)
        # In turns: each of the two plans anew for every rank, which is what takes the time.
        through_files = (through_shared_memory, from_disk)[number // NUM_SHARDS % 2]
        for carry in (in_process, through_files):
            arrived = carry(topology, held, number, folder)
            assert num_different(arrived, served) == 0, (carry.__name__, topology)
        back = planned(topology.target, topology.source, None)
        returned = empty(topology.source)
        execute(back, by_rank(served), by_rank(returned))
        assert num_different(returned, held) == 0, topology


PLAN_ELSEWHERE = """
import sys
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.plans.plan import plan_transfer
for line in sys.stdin:
    model, parallel, engine, nodes = eval(line)
    source = trainer_layout(
        ModelConfig.model_validate_json(model), ParallelConfig.model_validate_json(parallel)
    )
    target = engine_layout(ModelConfig.model_validate_json(model), *engine)
    print(plan_transfer(source, target, target_nodes=nodes).plan_id)
assert "torch" not in sys.modules
"""


def test_plans_are_equal_in_a_process_with_another_hash_seed_and_need_no_torch():
    some = sample()[:: len(sample()) // 100]
    lines = [
        repr(
            (
                one.model.model_dump_json(),
                one.parallel.model_dump_json(),
                (one.engine_tp_size, one.engine_ep_size, one.engine),
                nodes_of(one, number),
            )
        )
        for number, one in enumerate(some)
    ]
    elsewhere = subprocess.run(
        [sys.executable, "-c", PLAN_ELSEWHERE],
        input="\n".join(lines),
        env={"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [
        plan_transfer(one.source, one.target, target_nodes=nodes_of(one, number)).plan_id
        for number, one in enumerate(some)
    ]
    assert elsewhere.stdout.split() == here
