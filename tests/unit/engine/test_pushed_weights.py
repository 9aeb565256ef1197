"""What is pushed arrives in each rank's parameters bit by bit, or is not served at all.

SGLang's part, to call the loader on the model of each rank, is played here by plain modules;
``tests/sglang/test_weights.py`` has the real one.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.engine.sglang.weights import weight_sync
from npr_megatron.engine.sglang.weights.broadcast import digest_of
from npr_megatron.engine.sglang.weights.loader import load
from npr_megatron.engine.sglang.weights.pushed_weights import PushedWeights
from npr_megatron.errors import (
    DivergenceError,
    EngineLost,
    EnvironmentFault,
    LayoutError,
    StaleWeightsError,
)
from npr_megatron.weights.layouts import engine_layout, trainer_layout
from npr_megatron.weights.storages import DTYPES, box_reader, empty_storages, load_tiles
from tests.parity.test_export_hf import MODELS, random_tensors
from tests.publishing import published

MODEL = MODELS["qwen3"]


class Ranks:
    """Modules with the parameters of an SGLang engine, of which every number is garbage."""

    def __init__(self, model: ModelConfig, tp_size: int, dtype: torch.dtype) -> None:
        self.modules = [
            module_of(empty_storages(rank, dtype))
            for rank in engine_layout(model, tp_size, engine="sglang").ranks
        ]
        self.is_deaf = False

    def run(self, function, orders, stamping) -> None:
        assert function is weight_sync.carry_out
        if self.is_deaf:
            return
        for module, order in zip(self.modules, orders, strict=True):
            try:
                load(module, order.tensors())
            except StaleWeightsError as error:
                raise EngineLost("SGLang has ended") from error


def module_of(storages) -> nn.Module:
    """Return a module whose parameters have the names of ``storages``."""
    root = nn.Module()
    for name, storage in storages.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(torch.full_like(storage, 7.0)))
    return root


def rank_parts(model, tp_size, tensors, dtype):
    """Return what each rank must hold, cut by tiles and not by a plan."""
    for rank in engine_layout(model, tp_size, engine="sglang").ranks:
        storages = empty_storages(rank, dtype)
        load_tiles(rank, box_reader(tensors), storages)
        yield storages


def host_storages(model, tensors, dtype):
    (storages,) = rank_parts(model, 1, tensors, dtype)
    return storages


def assert_held(ranks: Ranks, model, tp_size, tensors, dtype) -> None:
    for module, expected in zip(
        ranks.modules, rank_parts(model, tp_size, tensors, dtype), strict=True
    ):
        for name, parameter in module.named_parameters():
            rows = slice(None)
            if "embed" in name or "lm_head" in name:  # SGLang never reads the rows behind these
                rows = slice(0, int((expected[name] != 0).any(1).sum()))
            assert torch.equal(parameter[rows], expected[name][rows]), name


@pytest.fixture
def started():
    with ExitStack() as cleanup:

        def start(tp_size=1, dtype="fp32", model=MODEL, told=None):
            config = EngineConfig(backend="sglang", tp_size=tp_size, dtype=dtype)
            ranks = Ranks(model, tp_size, DTYPES[dtype])
            weights = PushedWeights(told or model, config, ranks.run)
            cleanup.callback(weights.close)
            return weights, ranks

        yield start


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["qwen3", "qwen3 tied"])
def test_every_rank_holds_its_part_after_each_of_several_pushes(started, name, tp_size, dtype):
    model, kind = MODELS[name], DTYPES[dtype]
    weights, ranks = started(tp_size, dtype, model)
    weights.require_layout()
    tensors = random_tensors(model, kind)
    for version in (3, 4, 9):
        tensors = {key: tensor * 0.5 + version for key, tensor in tensors.items()}
        expected = host_storages(model, tensors, kind)
        weights.stage(expected)
        assert weights.version < version
        weights.commit(version, keeps_cache=False)
        assert weights.version == version
        assert_held(ranks, model, tp_size, tensors, kind)
        for key, storage in weights.served.items():
            assert torch.equal(storage, expected[key])


def test_the_served_copy_stays_while_the_shadow_is_filled(started):
    weights, _ = started()
    tensors = random_tensors(MODEL)
    first = host_storages(MODEL, tensors, torch.float32)
    weights.stage(first)
    weights.commit(1, keeps_cache=False)
    for storage in weights.staging().values():
        storage.fill_(9.0)
    assert all(torch.equal(storage, first[name]) for name, storage in weights.served.items())


@pytest.mark.parametrize("tp_size", [1, 2])
def test_damage_behind_the_check_ends_the_engine_and_is_named(started, tp_size):
    weights, _ = started(tp_size)
    weights.stage(host_storages(MODEL, random_tensors(MODEL), torch.float32))
    shadow = weights._host._slots.storages(weights._host.shadow)
    shadow["model.layers.1.mlp.down_proj.weight"][3, 5] += 1.0
    with pytest.raises(EngineLost, match=r"StaleWeightsError"):
        weights.commit(1, keeps_cache=False)
    assert weights.version == -1


def test_a_model_that_sglang_holds_otherwise_is_refused_with_every_difference(started):
    wide = MODEL.model_copy(update={"intermediate_size": 64})
    weights, ranks = started(model=wide, told=MODEL)
    with pytest.raises(LayoutError, match=r"has shape \[128, 32\], the layout says \[96, 32\]"):
        weights.require_layout()
    weights.stage(host_storages(MODEL, random_tensors(MODEL), torch.float32))
    with pytest.raises(LayoutError, match="down_proj"):
        weights.commit(1, keeps_cache=False)
    for module in ranks.modules:  # nothing was written
        assert all(bool((parameter == 7.0).all()) for parameter in module.parameters())


def test_a_parameter_that_nobody_declares_is_refused(started):
    weights, ranks = started()
    ranks.modules[0].register_parameter("bias", nn.Parameter(torch.zeros(3)))
    with pytest.raises(LayoutError, match="storage bias is not declared"):
        weights.require_layout()


def test_numbers_that_are_not_finite_are_refused_before_anything_is_stopped(started):
    weights, _ = started()
    weights.staging()["model.norm.weight"][2] = float("inf")
    with pytest.raises(DivergenceError, match=r"model\.norm\.weight"):
        weights.prepare(1)


def test_nothing_staged_is_nothing_to_commit(started):
    weights, _ = started()
    with pytest.raises(StaleWeightsError, match="nothing is staged"):
        weights.prepare(1)


def test_an_sglang_that_does_not_call_the_loader_is_found_out(started):
    weights, ranks = started()
    ranks.is_deaf = True
    with pytest.raises(EnvironmentFault, match="rank 0 did not carry it out"):
        weights.require_layout()


@pytest.mark.parametrize("tp_size", [1, 2])
def test_ranks_take_what_a_trainer_published_from_its_memory(started, tp_size, tmp_path):
    parallel = ParallelConfig(tp_size=2, pp_size=1, dp_size=1)
    layout, tensors = trainer_layout(MODEL, parallel), random_tensors(MODEL)
    weights, ranks = started(tp_size)
    with published(layout, tensors, 5, tmp_path) as publication:
        assert publication.digest == digest_of(MODEL, tensors)
        weights.pull(publication, parallel, means="shared_memory", keeps_cache=False)
    assert weights.version == 5
    assert_held(ranks, MODEL, tp_size, tensors, torch.float32)
    for name, storage in host_storages(MODEL, tensors, torch.float32).items():
        assert torch.equal(weights.served[name], storage)
