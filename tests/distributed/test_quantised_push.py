"""FP8 from real trainer ranks: amax over gloo, bytes through arenas and deltas, digests checked."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist

from npr_megatron.config.model import InitConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import DivergenceError
from npr_megatron.weights.checkpoints.hf import random_init
from npr_megatron.weights.delta_chain import Baseline, Chain, ServedVersion
from npr_megatron.weights.digest import Census, digests
from npr_megatron.weights.executors.delta import DeltaExchange, Receiving, Sending
from npr_megatron.weights.executors.shared_memory import Publisher, Receiver
from npr_megatron.weights.layouts import canonical_layout, engine_layout, trainer_layout
from npr_megatron.weights.layouts.served import (
    Quantisation,
    quantised_layout,
    scales_of,
    straddling_blocks,
)
from npr_megatron.weights.plans.plan import plan_transfer
from npr_megatron.weights.publication import Publication
from npr_megatron.weights.quantise import quantise
from npr_megatron.weights.source_quantiser import SourceQuantiser, all_max_over
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles
from tests.distributed.harness import run_ranks
from tests.unit.weights.oracles import tiny_model

MODEL = tiny_model(num_hidden_layers=2, hidden_size=8, intermediate_size=24)
QUANTISATION = Quantisation.of(MODEL, block_size=4)
TRAINER = trainer_layout(MODEL, ParallelConfig(tp_size=4))  # parts of 6 rows: blocks straddle
SOURCE = quantised_layout(TRAINER, QUANTISATION, may_straddle=True)
ENGINE = quantised_layout(engine_layout(MODEL, 2), QUANTISATION)
HF = quantised_layout(canonical_layout(MODEL), QUANTISATION)
DTYPE = torch.bfloat16


def weights_at(step: int):
    weights = random_init(MODEL, InitConfig(embedding_std=0.3), seed=1)
    for name, tensor in weights.items():
        if tensor.dim() == 2:
            rows = torch.arange(len(tensor))
            tensor *= (1 + (rows * len(name)) % 7)[:, None]  # parts of a block differ
            tensor[step % len(tensor)] *= 1 + step
    return {name: tensor.to(DTYPE) for name, tensor in weights.items()}


def held_by_trainer(rank: int, weights):
    storages = empty_storages(TRAINER.ranks[rank], DTYPE)
    load_tiles(TRAINER.ranks[rank], box_reader(weights), storages)
    return storages


def checkpoint(weights):
    """The FP8 checkpoint of ``weights``, each matrix quantised whole."""
    served = {}
    for name, weight in weights.items():
        if name in QUANTISATION.shapes:
            served[name], served[scales_of(name)] = quantise(weight, 4, QUANTISATION.rule)
        else:
            served[name] = weight
    return served


def expected_engine(weights):
    held = [empty_storages(rank, DTYPE) for rank in ENGINE.ranks]
    for rank, storages in zip(ENGINE.ranks, held, strict=True):
        load_tiles(rank, box_reader(checkpoint(weights)), storages)
    return held


def are_equal(one, other) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


def publish_and_pull(rank: int, world_size: int, init_method: str, folder: str):
    """Trainer rank ``rank``; ranks 0 and 1 are also the ranks of an engine of the same node."""
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    quantiser = SourceQuantiser(TRAINER, SOURCE, QUANTISATION, rank)
    all_max = all_max_over(dist.group.WORLD, timeout_s=30.0)
    publisher = Publisher(SOURCE, rank, DTYPE, run_id="fp8", arena_dir=folder)
    into = empty_storages(ENGINE.ranks[rank], DTYPE) if rank < 2 else None
    results = []
    for version in range(2):
        weights = weights_at(version)
        fill = partial(quantiser.quantise, held_by_trainer(rank, weights), all_max=all_max)
        part = publisher.publish_with(version, fill)
        parts = [None] * world_size
        dist.all_gather_object(parts, part)
        publication = Publication.assemble(parts)
        shares = [None] * world_size
        mine = Receiver(SOURCE, ENGINE, rank).pull(publication, into) if into else None
        dist.all_gather_object(shares, mine)
        publication.check(shares[:2])
        same_digest = publication.digest == Census(HF).shares(0, checkpoint(weights))[0]
        results.append(
            same_digest and (not into or are_equal(into, expected_engine(weights)[rank]))
        )
        dist.barrier()
    publisher.close()
    dist.destroy_process_group()
    return results


def test_engines_pull_the_fp8_checkpoint_of_a_trainer_that_cuts_blocks(tmp_path):
    assert straddling_blocks(TRAINER, QUANTISATION)
    assert run_ranks(publish_and_pull, 4, tmp_path, str(tmp_path)) == [[True, True]] * 4


def push_deltas(rank: int, world_size: int, init_method: str):
    """Trainer rank ``rank``; process 0 also holds both ranks of the engine."""
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    quantiser = SourceQuantiser(TRAINER, SOURCE, QUANTISATION, rank)
    all_max = all_max_over(dist.group.WORLD, timeout_s=30.0)
    exchange = DeltaExchange(
        plan_transfer(SOURCE, ENGINE),
        source_processes=range(4),
        target_processes=(0, 0),
        dtype=DTYPE,
        process_group=dist.group.WORLD,
        timeout_s=30.0,
    )
    baseline, chain = Baseline(), Chain()
    targets = {n: empty_storages(layout, DTYPE) for n, layout in enumerate(ENGINE.ranks)}
    results = []
    for step in range(4):
        weights = weights_at(step)
        served = empty_storages(SOURCE.ranks[rank], DTYPE)
        quantiser.quantise(held_by_trainer(rank, weights), served, all_max)
        version = ServedVersion(step, Census(HF).shares(0, checkpoint(weights))[0])
        traffic = exchange.push(
            Sending(version, {rank: served}, baseline),
            Receiving(targets, chain) if rank == 0 else None,
        )
        baseline.advance(version, {rank: served})
        chain.confirm(version)
        if rank == 0:
            census = Census(ENGINE)
            found = digests(census.shares(n, held) for n, held in targets.items())
            same = list(map(are_equal, targets.values(), expected_engine(weights)))
            results.append((found == {version.digest}, *same))
        else:
            results.append(traffic.num_full)
    dist.destroy_process_group()
    return results


def test_deltas_of_fp8_weights_and_scales_give_the_checkpoint_of_each_step(tmp_path):
    engine, *sources = run_ranks(push_deltas, 4, tmp_path)
    assert engine == [(True, True, True)] * 4
    assert sources == [[1, 0, 0, 0]] * 3  # everything at first, deltas from then on


def refuse_together(rank: int, world_size: int, init_method: str):
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world_size)
    storages = held_by_trainer(rank, weights_at(0))
    if rank == 2:
        storages["decoder.layers.1.self_attention.linear_proj.weight"][0, 0] = torch.nan
    quantiser = SourceQuantiser(TRAINER, SOURCE, QUANTISATION, rank)
    all_max = all_max_over(dist.group.WORLD, timeout_s=30.0)
    with pytest.raises(DivergenceError) as refused:
        quantiser.quantise(storages, empty_storages(SOURCE.ranks[rank], DTYPE), all_max)
    dist.destroy_process_group()
    return str(refused.value)


def test_one_nan_stops_all_ranks_at_once_and_its_holder_names_it(tmp_path):
    messages = run_ranks(refuse_together, 4, tmp_path)
    assert "model.layers.1.self_attn.o_proj.weight" in messages[2]
    assert all("another source rank" in messages[rank] for rank in (0, 1, 3))
