"""The backend that is asked for is made, or it is said by name why not."""

from __future__ import annotations

import sys

import pytest

from npr_megatron.config.engine import EngineConfig
from npr_megatron.engine.backends import create_engine, slots_needed, storages_of
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.sglang.client.reservations import room_problems
from npr_megatron.errors import ConfigError, EnvironmentFault
from npr_megatron.records.trajectory import DecodeMode
from tests.engines import TINY, request_for
from tests.structures import SMALL

SGLANG = EngineConfig(backend="sglang")


def test_the_embedded_engine_is_the_default():
    engine = create_engine(TINY, EngineConfig(), SMALL, "cpu")
    assert isinstance(engine, EmbeddedEngine)
    (layout,) = storages_of(TINY, EngineConfig()).ranks
    assert {storage.name: storage.shape for storage in layout.storages} == {
        name: tuple(tensor.shape) for name, tensor in engine.weights.items()
    }


def test_a_missing_sglang_names_its_installation(monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(EnvironmentFault, match="bash tools/setup_sglang"):
        create_engine(TINY, SGLANG, SMALL, "cpu")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (EngineConfig(tp_size=2), "cut by torchrun"),
        (EngineConfig(backend="sglang", weights="fp8"), 'weights is "fp8"'),
        (EngineConfig(backend="sglang", tp_size=3), "num_attention_heads 4"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_before_anything_starts(config, said):
    with pytest.raises(ConfigError, match=said):
        create_engine(TINY, config, SMALL, "cpu")


def test_sglang_has_storages_of_its_own_names_and_padding():
    (layout,) = storages_of(TINY, SGLANG).ranks
    shapes = {storage.name: storage.shape for storage in layout.storages}
    rows = -(-TINY.vocab_size // 64) * 64
    assert shapes["model.embed_tokens.weight"] == (rows, TINY.hidden_size)
    assert "model.layers.0.self_attn.qkv_proj.weight" in shapes


@pytest.mark.parametrize("mode", list(DecodeMode))
def test_the_pool_that_a_request_needs_is_enough_for_it_and_no_larger(mode):
    request = request_for((1, 2, 3), mode=mode, max_new_tokens=50, max_critical_path=50)
    needed = slots_needed(request, SGLANG)
    exact, short = (
        SGLANG.model_copy(update={"num_kv_slots": size}) for size in (needed, needed - 1)
    )
    assert room_problems(request, exact) == []
    assert room_problems(request, short) != []
