"""An engine in this process on an exported model: for ``npr generate`` and speed measurements."""

from __future__ import annotations

from pathlib import Path

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.hf_architecture import read_trainable_architecture
from npr_megatron.engine.engine import Engine
from npr_megatron.schema.tags import Vocabulary
from npr_megatron.weights.checkpoints.hf import read_hf
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.storages import load_tiles


def open_engine(folder: Path, config: EngineConfig, vocabulary: Vocabulary) -> Engine:
    """Return an engine that holds the weights of an HF folder.

    Raises:
        InputError: the folder holds no model of a supported architecture.
    """
    model = read_trainable_architecture(folder)
    engine = Engine(model, config, vocabulary)
    checkpoint = read_hf(folder, model)
    load_tiles(engine_layout(model).ranks[0], checkpoint.read, engine.staging())
    engine.commit(1)
    return engine
