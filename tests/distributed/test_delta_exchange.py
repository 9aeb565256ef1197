"""Chains of deltas between processes: always the bytes of a full push, never on a wrong base."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from npr_megatron.config.model import InitConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import EnvironmentFault, StaleWeightsError
from npr_megatron.weights.checkpoints.hf import random_init
from npr_megatron.weights.delta_chain import Baseline, Chain, ServedVersion
from npr_megatron.weights.digest import Census, digests
from npr_megatron.weights.executors.delta import DeltaExchange, Receiving, Sending
from npr_megatron.weights.layouts import canonical_layout, engine_layout, trainer_layout
from npr_megatron.weights.plans.plan import TransferPlan, plan_transfer
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles
from npr_megatron.weights.tiles import Layout
from tests.distributed.harness import run_ranks
from tests.unit.weights.oracles import tiny_model

MODEL = tiny_model(num_hidden_layers=2, hidden_size=16)
SOURCE = trainer_layout(MODEL, ParallelConfig(tp_size=2, pp_size=2))
TARGET = engine_layout(MODEL, 4)
PLAN = plan_transfer(SOURCE, TARGET, target_nodes=(0, 0, 0, 0))
"""Norms and kv heads, held by several ranks, arrive at one and are shared from there."""
SOURCE_PROCESSES = (0, 0, 1, 1)
TARGET_PROCESSES = (1, 2, 2, 2)
"""Process 0 only sends, 2 only receives, 1 does both and keeps some copies to itself."""
DTYPE = torch.bfloat16

NUM_STEPS = 200
LATE, EVERYTHING, ANCHOR, UNHEARD = 50, 100, 150, 170
"""Steps at which process 2 starts anew, all weights change, everything is sent, acks are lost."""


def weights_at(step: int):
    """Weights of a run in which each step changes about one element in fifty."""
    weights = {n: t.to(DTYPE) for n, t in random_init(MODEL, InitConfig(), seed=1).items()}
    for number in range(1, step + 1):
        change(weights, number)
    return weights


def change(weights, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    fraction = 1.0 if step == EVERYTHING else 0.02
    for tensor in weights.values():
        bits = tensor.view(torch.int16)
        flips = torch.rand(tensor.shape, generator=generator) < fraction
        bits[flips] ^= 1 + step % 7


def held_by(layout: Layout, weights, mine):
    """Storages of the ranks ``mine`` of ``layout``."""
    storages = {rank: empty_storages(layout.ranks[rank], DTYPE) for rank in mine}
    for rank, held in storages.items():
        load_tiles(layout.ranks[rank], box_reader(weights), held)
    return storages


def ranks_of(process: int, processes) -> list[int]:
    return [rank for rank, holder in enumerate(processes) if holder == process]


class Process:
    """One process with its ranks of both sides."""

    def __init__(self, me: int, plan: TransferPlan = PLAN, **options) -> None:
        self.mine = ranks_of(me, SOURCE_PROCESSES)
        self.targets = held_by(TARGET, weights_at(0), ranks_of(me, TARGET_PROCESSES))
        self.forget()
        self.baseline = Baseline()
        self.exchange = DeltaExchange(
            plan,
            source_processes=SOURCE_PROCESSES,
            target_processes=TARGET_PROCESSES,
            dtype=DTYPE,
            process_group=dist.group.WORLD,
            **{"timeout_s": 30.0, "message_bytes": 4000, **options},
        )
        self.census = Census(TARGET)

    def forget(self) -> None:
        self.chain = Chain()
        for storages in self.targets.values():
            for tensor in storages.values():
                tensor.fill_(1.5)

    def push(self, version: ServedVersion, weights, *, is_anchor: bool = False):
        self.sent = held_by(SOURCE, weights, self.mine)
        sending = Sending(version, self.sent, self.baseline, is_anchor) if self.mine else None
        receiving = Receiving(self.targets, self.chain) if self.targets else None
        return self.exchange.push(sending, receiving)

    def digests(self) -> set[int]:
        """Of all target ranks, which every process learns."""
        shares = {rank: self.census.shares(rank, held) for rank, held in self.targets.items()}
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, shares)
        joined = {rank: share for part in everywhere for rank, share in part.items()}
        return digests(joined[rank] for rank in range(len(TARGET.ranks)))


def run_chain(rank: int, world_size: int, init_method: str):
    """Return per step the traffic of this process, and the steps with a wrong digest."""
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    process, weights = Process(rank), weights_at(0)
    canonical = Census(canonical_layout(MODEL))
    traffic, wrong = [], []
    for step in range(NUM_STEPS):
        if step > 0:
            change(weights, step)
        if step == LATE and rank == 2:
            process.forget()
        version = ServedVersion(step, canonical.shares(0, weights)[0])
        traffic.append(process.push(version, weights, is_anchor=step == ANCHOR))
        if process.digests() != {version.digest}:
            wrong.append(step)
        process.chain.confirm(version)
        if step != UNHEARD:
            process.baseline.advance(version, process.sent)
    expected = held_by(TARGET, weights, process.targets)
    same = all(
        torch.equal(process.targets[target][name], tensor)
        for target, storages in expected.items()
        for name, tensor in storages.items()
    )
    dist.destroy_process_group()
    return traffic, wrong, same


def test_two_hundred_deltas_are_two_hundred_full_pushes_for_a_fraction_of_the_bytes(tmp_path):
    by_process = run_ranks(run_chain, 3, tmp_path)
    assert [wrong for _, wrong, _ in by_process] == [[], [], []]
    assert all(same for _, _, same in by_process)
    steps = list(zip(*(traffic for traffic, _, _ in by_process), strict=True))
    num_full = [sum(part.num_full for part in step) for step in steps]
    assert {step: count for step, count in enumerate(num_full) if count} == {
        0: 5,  # 0 -> 1, 0 -> 2, 1 -> 2, and shared 1 -> 2, 2 -> 1
        LATE: 4,
        ANCHOR: 5,
        UNHEARD + 1: 5,  # engines hold what the sources do not know to be held
    }
    full_bytes = sum(part.full_bytes for part in steps[0])
    sent_bytes = [sum(part.sent_bytes for part in step) for step in steps]
    for step in (0, EVERYTHING, ANCHOR):
        assert full_bytes < sent_bytes[step] < 1.5 * full_bytes  # tiny messages, much overhead
    deltas = [sent for step, sent in enumerate(sent_bytes) if not num_full[step]]
    assert len(deltas) == NUM_STEPS - 4
    assert sorted(deltas)[len(deltas) // 2] < 0.4 * full_bytes


def disagree(rank: int, world_size: int, init_method: str, about: str):
    """Process 0 has another version or plan than 1; return what each process makes of it."""
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    plan, version = PLAN, ServedVersion(7, 7)
    if rank == 0 and about == "version":
        version = ServedVersion(7, 8)
    elif rank == 0:
        plan = replace(PLAN, target_id="f" * 64)
    process = Process(rank, plan, timeout_s=10.0)
    try:
        process.push(version, weights_at(0))
    except (StaleWeightsError, EnvironmentFault) as error:
        untouched = all(
            bool((tensor == 1.5).all())
            for storages in process.targets.values()
            for tensor in storages.values()
        )
        return type(error).__name__, untouched
    return None


@pytest.mark.parametrize(
    ("about", "of_process_0"),
    [
        ("version", "EnvironmentFault"),  # its receivers refused and are gone
        ("plan", "StaleWeightsError"),
    ],
)
def test_sources_of_different_versions_or_plans_are_refused_before_anything_is_written(
    tmp_path, about, of_process_0
):
    refused = run_ranks(disagree, 3, tmp_path, about)
    assert refused == [(of_process_0, True), *[("StaleWeightsError", True)] * 2]


def share_all(rank: int, world_size: int, init_method: str):
    """Process 0 gives everything to 1, and 1 to 2; return the steps at which a copy was wrong."""
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    hf = canonical_layout(MODEL)
    copies = plan_transfer(hf, hf).copies
    shares = [replace(copy, target_rank=1) for copy in copies]
    exchange = DeltaExchange(
        TransferPlan.of(hf.layout_id, hf.layout_id, copies, shares),
        source_processes=(0,),
        target_processes=(1, 2),
        dtype=DTYPE,
        process_group=dist.group.WORLD,
        timeout_s=30.0,
    )
    baseline, chain, wrong = Baseline(), Chain(), []
    into = empty_storages(hf.ranks[0], DTYPE)
    traffic = []
    for step in range(4):
        weights, version = weights_at(step), ServedVersion(step, step)
        sending = Sending(version, {0: weights}, baseline) if rank == 0 else None
        receiving = Receiving({rank - 1: into}, chain) if rank > 0 else None
        traffic.append(exchange.push(sending, receiving))
        if rank > 0:
            if not all(torch.equal(into[name], weights[name]) for name in weights):
                wrong.append(step)
            assert chain.held is None  # until the digest was checked
            chain.confirm(version)
        baseline.advance(version, {0: weights})
    dist.destroy_process_group()
    return wrong, [(part.num_full, part.sent_bytes < part.full_bytes) for part in traffic]


def test_a_rank_that_gets_all_from_its_neighbour_gets_deltas_too(tmp_path):
    first, second, last = run_ranks(share_all, 3, tmp_path)
    assert first == second == ([], [(1, False), (0, True), (0, True), (0, True)])
    assert last == ([], [(0, False)] * 4)


def wait_for_a_stuck_peer(rank: int, world_size: int, init_method: str):
    """Process 0 never sends; return how the others learn of it, and after how long."""
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    process = Process(rank, timeout_s=0.5)
    process.chain.confirm(ServedVersion(0, 0))
    dist.barrier()
    if rank == 0:
        time.sleep(1.5)
        return None
    started = time.monotonic()
    with pytest.raises(EnvironmentFault):
        process.push(ServedVersion(1, 1), weights_at(0))
    return time.monotonic() - started, process.chain.held


def test_a_source_that_is_stuck_is_reported_within_the_deadline(tmp_path):
    for seconds, held in run_ranks(wait_for_a_stuck_peer, 3, tmp_path)[1:]:
        assert seconds < 2.5
        assert held == ServedVersion(0, 0)  # nothing was written
