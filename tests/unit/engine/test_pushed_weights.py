"""What is pushed arrives in each rank's parameters bit by bit, or is not served at all.

SGLang's part, to call the loader on the model of each rank, is played here by plain modules;
``tests/sglang/test_weights.py`` has the real one.
"""

from __future__ import annotations

import pickle
from contextlib import ExitStack
from itertools import chain
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn

from npr_megatron.config.engine import EngineConfig, SglangConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.sglang.weights import weight_sync
from npr_megatron.engine.sglang.weights.handover import Order
from npr_megatron.engine.sglang.weights.loader import carry_out
from npr_megatron.engine.sglang.weights.pushed_weights import PushedWeights
from npr_megatron.errors import (
    DivergenceError,
    EngineLost,
    EnvironmentFault,
    LayoutError,
    StaleWeightsError,
)
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.storages import DTYPES, box_reader, empty_storages, load_tiles
from tests.parity.test_export_hf import MODELS, random_tensors

MODEL = MODELS["qwen3"]


class Ranks:
    """Modules with the parameters of an SGLang engine, of which every number is garbage.

    By data-parallel rank, then by tensor-parallel rank. ``deaf`` is one that is told nothing.
    """

    def __init__(self, model: ModelConfig, config: EngineConfig) -> None:
        self.modules = [
            [
                module_of(empty_storages(rank, DTYPES[config.dtype]))
                for rank in engine_layout(model, config.tp_size, engine="sglang").ranks
            ]
            for _ in range(config.sglang.dp_size)
        ]
        self.deaf = -1

    def run(self, function, orders, stamping) -> None:
        assert function is weight_sync.carry_out
        messages = [ForkingPickler.dumps(order.tensors()) for order in orders]
        for dp_rank, modules in enumerate(self.modules):
            if dp_rank == self.deaf:
                continue
            for module, message in zip(modules, messages, strict=True):
                try:
                    carry_out(Order.of(pickle.loads(message)), module, dp_rank)
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
    parts = list(rank_parts(model, tp_size, tensors, dtype))
    for modules in ranks.modules:
        for module, expected in zip(modules, parts, strict=True):
            for name, parameter in module.named_parameters():
                rows = slice(None)
                if "embed" in name or "lm_head" in name:  # SGLang never reads those behind
                    rows = slice(0, int((expected[name] != 0).any(1).sum()))
                assert torch.equal(parameter[rows], expected[name][rows]), name


@pytest.fixture
def started():
    with ExitStack() as cleanup:

        def start(tp_size=1, dtype="fp32", model=MODEL, told=None, dp_size=1):
            config = EngineConfig(
                backend="sglang",
                tp_size=tp_size,
                dtype=dtype,
                sglang=SglangConfig(dp_size=dp_size),
            )
            ranks = Ranks(model, config)
            weights = PushedWeights(told or model, config, ranks.run)
            cleanup.callback(weights.close)
            return weights, ranks

        yield start


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("tp_size", "dp_size"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("name", ["qwen3", "qwen3 tied"])
def test_every_rank_holds_its_part_after_each_of_several_pushes(
    started, name, tp_size, dp_size, dtype
):
    model, kind = MODELS[name], DTYPES[dtype]
    weights, ranks = started(tp_size, dtype, model, dp_size=dp_size)
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
    for module in chain(*ranks.modules):  # nothing was written
        assert all(bool((parameter == 7.0).all()) for parameter in module.parameters())


def test_a_parameter_that_nobody_declares_is_refused(started):
    weights, ranks = started()
    ranks.modules[0][0].register_parameter("bias", nn.Parameter(torch.zeros(3)))
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


@pytest.mark.parametrize("deaf", [0, 1])
def test_a_data_parallel_rank_that_does_not_call_the_loader_is_found_out(started, deaf):
    weights, ranks = started(tp_size=2, dp_size=2)
    weights.require_layout()
    ranks.deaf = deaf
    with pytest.raises(EnvironmentFault, match=f"rank {2 * deaf} did not carry it out"):
        weights.require_layout()
