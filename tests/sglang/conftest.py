"""One SGLang engine with the plugin for all tests of stages; skipped where SGLang is absent."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import Qwen3ForCausalLM

from npr_megatron.weights.checkpoints.hf import write_hf
from tests.engines import UNTIED, steered_weights
from tests.parity.hf_reference import hf_model
from tests.sglang.stages import POISON, SPOKEN, StageServer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder: SGLang's imports warn, and it may be absent."""
    here = Path(__file__).parent
    is_absent = importlib.util.find_spec("sglang") is None
    for item in items:
        if here not in item.path.parents:
            continue
        for message in ("", "SWIG"):
            item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}"))
        if is_absent:
            item.add_marker(pytest.mark.skip(reason="sglang is not installed (tools/setup_sglang)"))


@pytest.fixture(scope="session")
def reference() -> Qwen3ForCausalLM:
    """The model of these tests, as transformers computes it."""
    weights = steered_weights(UNTIED, 0, SPOKEN, margin=30.0)
    weights["embed_tokens.weight"][POISON] = float("nan")
    return hf_model(UNTIED, weights)


@pytest.fixture(scope="session")
def model_folder(reference: Qwen3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of these tests, as SGLang reads it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_hf(folder, UNTIED, reference.state_dict())
    return folder


@pytest.fixture(scope="session")
def server(model_folder: Path) -> Iterator[StageServer]:
    """An engine with a pool of 2,048 slots, prefills in pieces of 32 tokens, and overlap."""
    with StageServer.started(model_folder) as server:
        yield server
