"""Plans over gloo messages between processes: every element, any message size, and a deadline."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import EnvironmentFault
from npr_megatron.weights.executors.gloo import exchange
from npr_megatron.weights.layout import engine_layout, trainer_layout
from npr_megatron.weights.plan import plan_transfer
from npr_megatron.weights.storages import empty_storages
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
    (torch.int64, 2**20),  # everything in one message
    (torch.bfloat16, 100),  # many messages, rows cut off large copies
    (torch.float32, 1),  # one row a message
)


def push(rank: int, world_size: int, init_method: str):
    """Exchange as process ``rank``; return per case what each target rank held here received."""
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    target = engine_layout(MODEL, ENGINE_TP)
    plan = plan_transfer(trainer_layout(MODEL, PARALLEL), target)
    received = []
    for dtype, message_bytes in CASES:
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
            process_group=dist.group.WORLD,
            timeout_s=30.0,
            message_bytes=message_bytes,
        )
        received.append(targets)
    dist.destroy_process_group()
    return received


def test_every_element_arrives_over_gloo_in_messages_of_any_size(tmp_path):
    by_process = run_ranks(push, 3, tmp_path)
    for case, (dtype, _) in enumerate(CASES):
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
            process_group=dist.group.WORLD,
            timeout_s=0.5,
        )
    return str(fault.value), time.monotonic() - started


def test_a_peer_that_never_sends_is_reported_within_the_deadline(tmp_path):
    message, seconds = run_ranks(wait_for_a_stuck_peer, 2, tmp_path)[0]
    assert "did not pass within 0.5 s" in message
    assert seconds < 2.5
