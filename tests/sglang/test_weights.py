"""Weights reach the parameters of a real SGLang in two tensor-parallel and data-parallel ranks.

What the ranks hold is compared by SGLang's own checksums with parts that are cut by tiles, not by
the plan under which they were pushed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from npr_megatron.config.engine import EngineConfig, SglangConfig
from npr_megatron.config.model import ModelConfig
from npr_megatron.engine.sglang import controls
from npr_megatron.engine.sglang.client.server import Server
from npr_megatron.engine.sglang.client.thread import LoopThread
from npr_megatron.engine.sglang.options import (
    server_environment,
    server_options,
    usable_cores,
    write_model_folder,
)
from npr_megatron.engine.sglang.weights.pushed_weights import PushedWeights
from npr_megatron.errors import EngineLost, LayoutError
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles
from tests.parity.test_export_hf import random_tensors
from tests.sglang import beside

MODEL = ModelConfig(
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,  # SGLang would pad it to 64 on a CPU
    vocab_size=128,  # whole at two ranks: padding would be SGLang's own garbage
    tie_word_embeddings=False,
    max_position_embeddings=512,
)
PROMPT = [3, 4, 5]


class Engine:
    """SGLang without our scheduling: a server, and the weights in it."""

    def __init__(self, tp_size: int, dp_size: int, folder: Path) -> None:
        config = EngineConfig(
            backend="sglang",
            tp_size=tp_size,
            sglang=SglangConfig(dp_size=dp_size),
            num_kv_slots=1024,
            max_streams=8,
        )
        write_model_folder(MODEL, config, folder)
        environment = server_environment(config, "cpu", usable_cores(), os.environ)
        self.config = config
        self.thread = LoopThread("sglang")
        self.server = Server(
            server_options(MODEL, config, "cpu", folder),
            environment,
            folder / "sglang.log",
            take=lambda number, result: None,
            fail=lambda fault: None,
        )
        self.weights = PushedWeights(MODEL, config, self.run)
        self.thread.run(self.server.start(config.sglang.start_timeout_s))

    def run(self, function, *arguments):
        return self.thread.run(self.server.call(function, *arguments))

    def assert_holds(self, tensors) -> None:
        """Compare ranks and host with whole parameters."""
        parts = list(cut(self.config.tp_size, tensors))
        expected = self.run(beside.checksums_of, parts) * self.config.sglang.dp_size
        for found, rank in zip(self.run(beside.checksums), expected, strict=True):
            assert rank.items() <= found.items()
        (host,) = cut(1, tensors)
        for name, storage in self.weights.served.items():
            assert torch.equal(storage, host[name]), name

    def close(self) -> None:
        self.thread.run(self.server.close())
        self.thread.close()
        self.weights.close()


def cut(tp_size: int, tensors) -> Iterator[dict[str, torch.Tensor]]:
    for rank in engine_layout(MODEL, tp_size, engine="sglang").ranks:
        storages = empty_storages(rank, torch.float32)
        load_tiles(rank, box_reader(tensors), storages)
        yield storages


def tensors_of(version: int) -> dict[str, torch.Tensor]:
    return {name: tensor + 0.01 * version for name, tensor in random_tensors(MODEL).items()}


TP_2 = pytest.param((2, 1), id="tp 2")
DP_2 = pytest.param((1, 2), id="dp 2", marks=pytest.mark.thorough)  # see test_data_parallel


@pytest.fixture(scope="module", params=[TP_2, DP_2])
def engine(request, tmp_path_factory) -> Iterator[Engine]:
    engine = Engine(*request.param, tmp_path_factory.mktemp("model"))
    yield engine
    engine.close()


def commit(engine: Engine, version: int, *, keeps_cache: bool = False) -> None:
    (host,) = cut(1, tensors_of(version))
    engine.weights.stage(host)
    engine.weights.commit(version, keeps_cache=keeps_cache)


def test_sglang_holds_the_model_as_our_layout_declares(engine):
    engine.weights.require_layout()


def test_the_shadow_reaches_every_rank(engine):
    for version in (1, 2):
        commit(engine, version)
        engine.assert_holds(tensors_of(version))
    assert engine.run(beside.spans, PROMPT, 4) == [{"version": "2", "start": 0, "end": 4}]


def test_tokens_on_both_sides_of_a_push_are_told_apart(engine):
    commit(engine, 6)
    engine.run(beside.begin, PROMPT, 60)
    engine.run(controls.pause)
    commit(engine, 7, keeps_cache=True)
    engine.run(controls.go_on)
    before, after = engine.run(beside.end)
    assert (before["version"], after["version"]) == ("6", "7")
    assert 0 < before["end"] == after["start"] < after["end"] == 60
    assert engine.run(beside.spans, PROMPT, 2) == [{"version": "7", "start": 0, "end": 2}]


def test_a_model_of_other_widths_is_refused_and_nothing_is_written(engine):
    commit(engine, 8)
    narrow = MODEL.model_copy(update={"intermediate_size": 32})
    other = PushedWeights(narrow, engine.config, engine.run)
    with pytest.raises(LayoutError, match=r"mlp\.down_proj\.weight has shape"):
        other.require_layout()
    other.close()
    engine.assert_holds(tensors_of(8))


def test_damage_on_the_way_ends_the_engine_and_is_named(engine):
    (host,) = cut(1, tensors_of(9))
    engine.weights.stage(host)
    weights = engine.weights._host
    weights._slots.storages(weights.shadow)["model.layers.1.mlp.down_proj.weight"][3, 5] += 1.0
    with pytest.raises(EngineLost, match="StaleWeightsError"):
        engine.weights.commit(9, keeps_cache=False)
    assert engine.weights.version == 8
