"""Chains of engines over gloo: every byte through every link, and links that break half way."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from npr_megatron.errors import EnvironmentFault
from npr_megatron.weights.digest import Census
from npr_megatron.weights.executors.relay import Link, Relay
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.storages import empty_storages
from tests.distributed.harness import run_ranks
from tests.unit.weights.oracles import element_ids, engine_storages, tiny_model

MODEL = tiny_model()
LAYOUT = engine_layout(MODEL)
CHUNK_BYTES = 200  # cuts large storages and packs small ones


def version() -> dict[str, torch.Tensor]:
    return engine_storages(MODEL, 1, element_ids(MODEL))[0]


def nothing() -> dict[str, torch.Tensor]:
    return empty_storages(LAYOUT.ranks[0], torch.int64)


def digest(storages) -> int:
    return Census(LAYOUT).shares(0, storages)[0]


def links(rank: int, world_size: int, init_method: str, pairs):
    """Join the world and one group per pair; return this rank's links by pair."""
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    found = {}
    for pair in pairs:
        group = dist.new_group(list(pair))
        if rank in pair:
            other = pair[0] if rank == pair[1] else pair[1]
            found[pair] = Link(f"engine {other}", group, pair.index(other))
    return found


def chain(rank: int, world_size: int, init_method: str):
    """Be one of a chain in the order of ranks; return the digest of what is held at the end."""
    pairs = [(parent, parent + 1) for parent in range(world_size - 1)]
    found = links(rank, world_size, init_method, pairs)
    storages = version() if rank == 0 else nothing()
    relay = Relay(storages, is_source=rank == 0, timeout_s=30, chunk_bytes=CHUNK_BYTES)
    relay.run(found.get((rank - 1, rank)), found.get((rank, rank + 1)))
    dist.barrier()
    dist.destroy_process_group()
    return digest(storages), relay.num_held, relay.num_chunks


def test_every_engine_of_a_chain_gets_every_byte(tmp_path):
    results = run_ranks(chain, 4, tmp_path)
    expected = digest(version())
    assert expected != digest(nothing())
    num_chunks = results[0][2]
    assert num_chunks > 20
    assert results == [(expected, num_chunks, num_chunks)] * 4


def broken_chain(rank: int, world_size: int, init_method: str, is_stuck: bool):
    """0 -> 1 -> 2, where 1 stops after three chunks; 2 goes on with 0 over another group."""
    found = links(rank, world_size, init_method, [(0, 1), (1, 2), (0, 2)])
    storages = version() if rank == 0 else nothing()
    relay = Relay(storages, is_source=rank == 0, timeout_s=1, chunk_bytes=CHUNK_BYTES)
    if rank == 1:
        parent, child = found[(0, 1)], found[(1, 2)]
        for number, chunk in enumerate(relay._chunks[:3]):
            wire = torch.empty(sum(part.numel() for part in chunk), dtype=torch.uint8)
            dist.recv(wire, group=parent.process_group, group_src=parent.peer, tag=number)
            dist.send(wire, group=child.process_group, group_dst=child.peer, tag=number)
        if is_stuck:
            time.sleep(4)
        return None
    started = time.monotonic()
    neighbours = (None, found[(0, 1)]) if rank == 0 else (found[(1, 2)], None)
    with pytest.raises(EnvironmentFault) as fault:
        relay.run(*neighbours)
    seconds, held = time.monotonic() - started, relay.num_held
    if rank == 0:
        relay.run(None, found[(0, 2)], child_needs=3)
    else:
        relay.run(found[(0, 2)], None)
    return str(fault.value), seconds, held, digest(storages)


@pytest.mark.parametrize("is_stuck", [False, True], ids=["dead", "stuck"])
def test_a_lost_link_is_named_on_both_sides_and_the_child_goes_on_with_its_grandparent(
    tmp_path, is_stuck
):
    above, _, below = run_ranks(broken_chain, 3, tmp_path, is_stuck)
    assert above[0].startswith("child engine 1 did not take chunk ")
    assert below[0].startswith("parent engine 1 did not pass chunk 3 of ")
    assert below[2] == 3
    assert above[1] < 3 and below[1] < 3
    assert above[3] == below[3] == digest(version())
