"""HF -> Megatron (A) -> HF -> Megatron (B) -> engine: every byte arrives as it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig, TrainerConfig
from npr_megatron.weights.checkpoints.hf import read_hf, write_hf
from npr_megatron.weights.executors.inproc import execute
from npr_megatron.weights.layouts import canonical_layout, engine_layout, trainer_layout
from npr_megatron.weights.layouts.served import Quantisation, quantised_layout
from npr_megatron.weights.names import canonical_parameters
from npr_megatron.weights.plans.plan import plan_transfer
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles
from npr_megatron.weights.tiles import Layout
from tests.distributed.harness import run_ranks
from tests.distributed.jobs import MODEL
from tests.parity.test_export_hf import MODELS
from tests.unit.weights.test_source_quantiser import (
    quantised_by_ranks,
    random_weights,
    whole_matrices,
)

BF16 = torch.bfloat16
Tensors = dict[str, torch.Tensor]
DENSE = [
    ({"tp_size": 2, "pp_size": 3}, {"tp_size": 4, "cp_size": 2}, (1, 1)),
    ({"tp_size": 4}, {"dp_size": 2, "tp_size": 2}, (4, 1)),
    (
        {"pp_size": 2, "num_layers_in_first_stage": 1},
        {"pp_size": 2, "vpp_size": 2, "pipeline_layout": "Et|t|t|L"},
        (2, 1),
    ),
    ({"vocab_divisor": 24, "tp_size": 2}, {"vocab_divisor": 10, "tp_size": 4}, (2, 1)),
]
EXPERTS = [
    ({"dp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2, "etp_size": 1}, (4, 2)),
    (
        {"tp_size": 2, "dp_size": 2, "ep_size": 2, "etp_size": 2},
        {"pp_size": 3, "dp_size": 4, "ep_size": 4},
        (2, 1),
    ),
    ({"etp_size": 4, "dp_size": 4}, {"tp_size": 4, "ep_size": 2, "etp_size": 2}, (4, 4)),
]
CASES = [
    *((name, *case) for name in ("qwen3", "qwen3 tied", "llama") for case in DENSE),
    *((name, *case) for name in ("qwen3_moe, dense first", "glm4_moe") for case in EXPERTS),
]


def random_bits(model: ModelConfig) -> Tensors:
    """Every bit pattern may occur, NaN and infinity too: weights are moved, not computed with."""
    torch.manual_seed(5)
    tensors: Tensors = {}
    for parameter in canonical_parameters(model):
        word, dtype = (torch.int32, torch.float32) if parameter.dtype else (torch.int16, BF16)
        bound = torch.iinfo(word).max
        bits = torch.randint(-bound, bound, parameter.shape, dtype=word)
        tensors[parameter.name] = bits.view(dtype)
    return tensors


def filled(layout: Layout, read: Any) -> list[Tensors]:
    """Return the storages of every rank, loaded box by box."""
    ranks = [empty_storages(rank, BF16) for rank in layout.ranks]
    for rank, storages in zip(layout.ranks, ranks, strict=True):
        load_tiles(rank, read, storages)
    return ranks


def moved(source: Layout, target: Layout, storages: list[Tensors]) -> list[Tensors]:
    """Return the storages of every target rank, filled by the planned copies."""
    ranks = [empty_storages(rank, BF16) for rank in target.ranks]
    execute(plan_transfer(source, target), dict(enumerate(storages)), dict(enumerate(ranks)))
    return ranks


def through_megatron(folder: Path, model: ModelConfig, layout: Layout, out: Path) -> list[Tensors]:
    """Read a folder into trainer ranks and write them to another; return what the ranks hold."""
    ranks = filled(layout, read_hf(folder, model).read)
    (whole,) = moved(layout, canonical_layout(model), ranks)
    write_hf(out, model, whole)
    return ranks


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def bits_differ(found: list[Tensors], expected: list[Tensors]) -> list[str]:
    """Name the storages that are not equal byte by byte."""
    assert [one.keys() for one in found] == [one.keys() for one in expected]
    return [
        f"rank {rank} {name}"
        for rank, (one, other) in enumerate(zip(found, expected, strict=True))
        for name in one
        if one[name].dtype != other[name].dtype
        or not torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
    ]


@pytest.mark.parametrize(("name", "a", "b", "engine"), CASES, ids=str)
def test_every_byte_survives_two_trainers_and_reaches_the_engine(name, a, b, engine, tmp_path):
    model, engine_ranks = MODELS[name], engine_layout(MODELS[name], *engine)
    tensors = random_bits(model)
    write_hf(tmp_path / "original", model, tensors)
    trainers = [trainer_layout(model, ParallelConfig(**sizes)) for sizes in (a, b)]
    through_megatron(tmp_path / "original", model, trainers[0], tmp_path / "after a")
    held = through_megatron(tmp_path / "after a", model, trainers[1], tmp_path / "after b")
    assert files(tmp_path / "after a") == files(tmp_path / "original")
    assert files(tmp_path / "after b") == files(tmp_path / "original")
    served = moved(trainers[1], engine_ranks, held)
    assert bits_differ(served, filled(engine_ranks, box_reader(tensors))) == []


FP8_SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
FP8_EXPERTS = {"moe_intermediate_size": 32, "shared_intermediate_size": 64}
BLOCK = 16


def in_fp8_sizes(model: ModelConfig) -> ModelConfig:
    moe = model.moe and model.moe.model_copy(
        update={name: n for name, n in FP8_EXPERTS.items() if getattr(model.moe, name)}
    )
    return model.model_copy(update={**FP8_SIZES, "moe": moe})


@pytest.mark.parametrize("rule", ["exact", "power_of_two"])
@pytest.mark.parametrize(
    ("name", "a", "b", "engine"),
    [
        ("qwen3 tied", {"pp_size": 3}, {"tp_size": 4}, (2, 1)),
        (
            "llama",
            {"tp_size": 2},
            {"pp_size": 2, "tp_size": 4, "num_layers_in_first_stage": 1},
            (1, 1),
        ),
        (
            "qwen3_moe, dense first",
            {"ep_size": 2, "dp_size": 2},
            {"etp_size": 4, "dp_size": 4},
            (2, 2),
        ),
        (
            "glm4_moe",
            {"tp_size": 2},
            {"tp_size": 2, "dp_size": 2, "ep_size": 4, "etp_size": 1},
            (2, 1),
        ),
    ],
    ids=str,
)
def test_every_byte_of_fp8_is_that_of_whole_matrices(name, a, b, engine, rule, tmp_path):
    model = in_fp8_sizes(MODELS[name])
    tensors = random_weights(model, 3, BF16)
    tensors |= {p.name: tensors[p.name].float() for p in canonical_parameters(model) if p.dtype}
    write_hf(tmp_path / "original", model, tensors)
    trainers = [trainer_layout(model, ParallelConfig(**sizes)) for sizes in (a, b)]
    through_megatron(tmp_path / "original", model, trainers[0], tmp_path / "after a")
    held = filled(trainers[1], read_hf(tmp_path / "after a", model).read)

    quantisation = Quantisation.of(model, BLOCK, rule)
    source = quantised_layout(trainers[1], quantisation, may_straddle=True)
    target = quantised_layout(engine_layout(model, *engine), quantisation)
    served = moved(source, target, quantised_by_ranks(trainers[1], source, quantisation, held))
    expected = filled(target, box_reader(whole_matrices(tensors, quantisation)))
    assert bits_differ(served, expected) == []


def convert(rank, world_size, init_method, folder, layouts):
    """Pass ``folder`` through a trainer of each layout, exporting and publishing every time.

    Returns the bits of an engine that pulled what the last one published.
    """
    import torch.distributed as dist

    from npr_megatron.train.rank import RankInfo, TrainerRank
    from npr_megatron.weights.executors.shared_memory import Receiver
    from npr_megatron.weights.publication import Publication

    source, engine = folder / "original", engine_layout(MODEL)
    staging: Tensors = {}
    for name, parallel in layouts.items():
        trainer = TrainerRank(
            RankInfo(rank=rank, world_size=world_size, init_method=f"{init_method}-{name}"),
            model=MODEL,
            parallel=parallel,
            trainer=TrainerConfig(dtype="bf16"),
            run_id=f"round-trip-{name}",
            arena_dir=str(folder),
        )
        trainer.load_hf(source)
        source = folder / f"after {name}"
        trainer.export_hf(source)
        parts: list[Any] = [None] * world_size
        dist.all_gather_object(parts, trainer.publish(1))
        staging = empty_storages(engine.ranks[0], BF16)
        receiver = Receiver(trainer_layout(MODEL, parallel), engine)
        receiver.pull(Publication.assemble(parts), staging)
        receiver.close()
        dist.barrier()
        trainer.close()
    return {name: tensor.view(torch.int16).numpy() for name, tensor in staging.items()}


def test_every_byte_survives_real_trainer_ranks(tmp_path):
    tensors = random_bits(MODEL)
    write_hf(tmp_path / "original", MODEL, tensors)
    layouts = {"a": ParallelConfig(tp_size=2), "b": ParallelConfig(pp_size=2)}
    received = run_ranks(convert, 2, tmp_path, tmp_path, layouts)
    assert files(tmp_path / "after a") == files(tmp_path / "original")
    assert files(tmp_path / "after b") == files(tmp_path / "original")
    expected = filled(engine_layout(MODEL), box_reader(tensors))
    for served in received:
        bits = {name: torch.from_numpy(array).view(BF16) for name, array in served.items()}
        assert bits_differ([bits], expected) == []
