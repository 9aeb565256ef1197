"""Plans over gloo messages between processes: every element, any message size, and a deadline."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import EnvironmentFault
from npr_megatron.weights.box import Box
from npr_megatron.weights.executors.process_group import exchange
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.plans.plan import plan_transfer
from npr_megatron.weights.storages import empty_storages
from npr_megatron.weights.tiles import Layout, Storage, Tile, rank_of
from tests.distributed.harness import run_ranks
from tests.unit.weights.oracles import (
    element_ids,
    engine_storages,
    num_different,
    tiny_model,
    trainer_storages,
)

MODEL = tiny_model()
PARALLEL = ParallelConfig(tp_size=2, pp_size=2)
ENGINE_TP = 4
SOURCE_PROCESSES = (0, 0, 1, 1)
TARGET_PROCESSES = (1, 1, 2, 2)
"""Process 0 only sends, 2 only receives, 1 does both and keeps some copies to itself."""


def payload(dtype: torch.dtype):
    return {name: ids.to(dtype) for name, ids in element_ids(MODEL).items()}


CASES = (
    (torch.int64, 2**20, None),  # everything in one message
    (torch.bfloat16, 100, None),  # many messages, rows cut off large copies
    (torch.float32, 1, None),  # one row a message
    (torch.int64, 300, (0, 0, 0, 0)),  # engine ranks of one node share what several of them want
)
"""Dtype, message size, node of each engine rank."""


def push(rank: int, world_size: int, init_method: str):
    """Exchange as process ``rank``; return per case what each target rank held here received."""
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    target = engine_layout(MODEL, ENGINE_TP)
    received = []
    for dtype, message_bytes, nodes in CASES:
        plan = plan_transfer(trainer_layout(MODEL, PARALLEL), target, target_nodes=nodes)
        assert (nodes is None) == (plan.shares == ())
        held = trainer_storages(MODEL, PARALLEL, payload(dtype))
        targets = {
            number: empty_storages(target.ranks[number], dtype)
            for number, process in enumerate(TARGET_PROCESSES)
            if process == rank
        }
        exchange(
            plan,
            source_processes=SOURCE_PROCESSES,
            target_processes=TARGET_PROCESSES,
            sources={n: held[n] for n, process in enumerate(SOURCE_PROCESSES) if process == rank},
            targets=targets,
            dtype=dtype,
            process_group=dist.group.WORLD,
            timeout_s=30.0,
            message_bytes=message_bytes,
        )
        received.append(targets)
    dist.destroy_process_group()
    return received


def test_every_element_arrives_over_gloo_in_messages_of_any_size(tmp_path):
    by_process = run_ranks(push, 3, tmp_path)
    for case, (dtype, _, _) in enumerate(CASES):
        received = {n: held for process in by_process for n, held in process[case].items()}
        expected = engine_storages(MODEL, ENGINE_TP, payload(dtype))
        assert num_different([received[n] for n in range(ENGINE_TP)], expected) == 0


def wait_for_a_stuck_peer(rank: int, world_size: int, init_method: str):
    """Process 0 expects weights from process 1, which never sends; return its error and seconds."""
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    if rank == 1:
        time.sleep(3)
        return None
    source, target = trainer_layout(MODEL, ParallelConfig()), engine_layout(MODEL)
    started = time.monotonic()
    with pytest.raises(EnvironmentFault) as fault:
        exchange(
            plan_transfer(source, target),
            source_processes=(1,),
            target_processes=(0,),
            sources={},
            targets={0: empty_storages(target.ranks[0], torch.float32)},
            dtype=torch.float32,
            process_group=dist.group.WORLD,
            timeout_s=0.5,
        )
    return str(fault.value), time.monotonic() - started


def test_a_peer_that_never_sends_is_reported_within_the_deadline(tmp_path):
    message, seconds = run_ranks(wait_for_a_stuck_peer, 2, tmp_path)[0]
    assert "did not pass within 0.5 s" in message
    assert seconds < 2.5


def mixed_layout(num_ranks: int, axis: int) -> Layout:
    """A matrix cut along ``axis``, stacked fp8 experts and an fp32 bias on every rank."""
    ranks = []
    for rank in range(num_ranks):
        cut = 1024 // num_ranks
        start, shape = [0, 0], [1024, 1024]
        start[axis], shape[axis] = rank * cut, cut
        experts = [
            Tile(f"expert {e}", Box((0, 0), (8, 16)), "experts", (e, 0, 0)) for e in range(2)
        ]
        ranks.append(
            rank_of(
                [
                    (Storage("bias", (7,), "fp32"), (Tile("b", Box((0,), (7,)), "bias", (0,)),)),
                    (Storage("experts", (2, 8, 16), "fp8_e4m3"), tuple(experts)),
                    (
                        Storage("matrix", tuple(shape)),
                        (Tile("m", Box.at(tuple(start), tuple(shape)), "matrix", (0, 0)),),
                    ),
                ]
            )
        )
    return Layout("engine", tuple(ranks))


def random_bits(layout: Layout) -> list[dict[str, torch.Tensor]]:
    """Storages of random bits whose replicas are equal; all of one matrix."""
    generator = torch.Generator().manual_seed(5)
    held = [empty_storages(rank, torch.bfloat16) for rank in layout.ranks]
    for name in ("bias", "experts"):
        first = held[0][name].view(torch.uint8)
        bits = torch.randint(0, 256, first.shape, dtype=torch.uint8, generator=generator)
        for storages in held:
            storages[name].view(torch.uint8).copy_(bits)
    whole = torch.randint(0, 2**15, (1024, 1024), dtype=torch.int16, generator=generator)
    for rank, storages in zip(layout.ranks, held, strict=True):
        (tile,) = (tile for tile in rank.tiles if tile.parameter == "m")
        storages["matrix"].view(torch.int16).copy_(whole[tile.box.slices])
    return held


AXES = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Along which the matrix is cut at the source and at the target."""


def push_mixed(rank: int, world_size: int, init_method: str):
    """Process 0 holds two source ranks, 1 two target ranks; return what they received per case."""
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    received = []
    for source_axis, target_axis in AXES:
        source, target = mixed_layout(2, source_axis), mixed_layout(2, target_axis)
        targets = {n: empty_storages(target.ranks[n], torch.bfloat16) for n in range(2)}
        exchange(
            plan_transfer(source, target),
            source_processes=(0, 0),
            target_processes=(1, 1),
            sources=dict(enumerate(random_bits(source))) if rank == 0 else {},
            targets=targets if rank == 1 else {},
            dtype=torch.bfloat16,
            process_group=dist.group.WORLD,
            timeout_s=30.0,
            message_bytes=8 * 2**20,
        )
        received.append([as_bytes(held) for held in targets.values()])
    dist.destroy_process_group()
    return received


def as_bytes(storages: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.view(torch.uint8) for name, tensor in storages.items()}


def test_pinned_dtypes_and_large_row_and_column_slices_arrive(tmp_path):
    by_case = run_ranks(push_mixed, 2, tmp_path)[1]
    for (_, target_axis), received in zip(AXES, by_case, strict=True):
        expected = [as_bytes(held) for held in random_bits(mixed_layout(2, target_axis))]
        assert num_different(received, expected) == 0
