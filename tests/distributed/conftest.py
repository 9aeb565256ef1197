"""Starting weights, written once."""

from __future__ import annotations

import pytest

from npr_megatron.config.model import InitConfig, ModelConfig
from npr_megatron.weights.checkpoints.hf import random_init, write_hf
from tests.distributed.jobs import MODEL


def write_model(folder, model: ModelConfig):
    """Write a random model whose norms are not all ones, so that a lost norm shows."""
    tensors = random_init(model, InitConfig(embedding_std=0.3), seed=3)
    for number, (name, tensor) in enumerate(tensors.items()):
        if "norm" in name:
            tensor.add_((tensor.cumsum(0) * (number + 1)).sin() * 0.2)
    write_hf(folder, model, tensors)
    return folder


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """An HF folder of the tied test model."""
    return write_model(tmp_path_factory.mktemp("weights") / "tied", MODEL)


@pytest.fixture(scope="session")
def untied_hf_folder(tmp_path_factory):
    """The same with a head of its own."""
    untied = MODEL.model_copy(update={"tie_word_embeddings": False})
    return write_model(tmp_path_factory.mktemp("weights") / "untied", untied)
