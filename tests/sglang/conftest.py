"""One SGLang engine with the plugin for all tests of stages; skipped where SGLang is absent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from npr_megatron.engine.sglang.engine import SglangEngine
from npr_megatron.weights.checkpoints.hf import write_hf
from tests.absence import absence_of_sglang
from tests.engines import UNTIED, assert_nothing_is_left, steered_weights, step_until
from tests.parity.hf_reference import hf_model
from tests.sglang.stages import POISON, SPOKEN, StageServer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder: SGLang's imports warn, and it may be absent."""
    here = Path(__file__).parent
    absence = absence_of_sglang()
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning"))
        if absence:
            item.add_marker(pytest.mark.skip(reason=absence))


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    """The model of these tests, as the embedded engine computes it."""
    return steered_weights(UNTIED, 0, SPOKEN, margin=30.0)


@pytest.fixture(scope="session")
def reference(weights: dict[str, torch.Tensor]) -> Qwen3ForCausalLM:
    """The model of these tests, as transformers computes it; ``POISON`` is not a number to it."""
    reference = hf_model(UNTIED, weights)
    reference.get_input_embeddings().weight.data[POISON] = float("nan")
    return reference


@pytest.fixture(scope="session")
def model_folder(reference: Qwen3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of these tests, as SGLang reads it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_hf(folder, UNTIED, reference.state_dict())
    return folder


@pytest.fixture(scope="session")
def running_server(model_folder: Path) -> Iterator[StageServer]:
    """An engine with a pool of 2,048 slots, prefills in pieces of 32 tokens, and overlap."""
    with StageServer.started(model_folder) as server:
        yield server


@pytest.fixture
def server(running_server: StageServer) -> StageServer:
    """The engine, empty: what earlier tests leased and did not release would take its pool."""
    running_server.flush()
    return running_server


@pytest.fixture
def engine(started: SglangEngine) -> Iterator[SglangEngine]:
    """The engine that a module has ``started``; every test leaves nothing in it."""
    yield started
    step_until(started, lambda: not started.num_unfinished, within_s=60.0)
    assert_nothing_is_left(started)
