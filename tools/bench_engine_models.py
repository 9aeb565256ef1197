"""The model that tools/bench_engine.py measures with, in the engine and in HF Transformers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import InitConfig, ModelConfig
from npr_megatron.engine.compute.runner import Runner
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.interface import Engine
from npr_megatron.schema.tags import Vocabulary
from npr_megatron.weights.checkpoints.hf import random_init, write_hf
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.storages import box_reader, load_tiles

WORDS = range(20, 100)
"""Ids that are neither tags nor numbers nor the end."""
VOCABULARY = Vocabulary(
    guideline_open=2,
    guideline_close=3,
    plan_open=4,
    plan_close=5,
    step_open=6,
    step_close=7,
    takeaway_open=8,
    takeaway_close=9,
    newline=10,
    eos=1,
    index_ids=tuple((index, 19) for index in range(11, 16)),
    blank_ids=frozenset({10}),
)
TINY = ModelConfig(
    num_hidden_layers=4,
    hidden_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=384,
    vocab_size=512,
    tie_word_embeddings=False,
)
"""The model of most measurements on a CPU: small, so that what an engine adds to it shows."""
BEYOND_CACHES = ModelConfig(
    num_hidden_layers=4,
    hidden_size=1024,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
    intermediate_size=3072,
    vocab_size=2048,
    tie_word_embeddings=False,
)
"""200 MB of weights: a step waits for memory, as it does with every model of use. Weights that stay
in a cache are read in no time, and five streams cost more than one by their arithmetic alone.
"""
FOUR_BILLION = ModelConfig(
    num_hidden_layers=36,
    hidden_size=2560,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=9728,
    vocab_size=151_936,
    rope_theta=1e6,
    max_position_embeddings=40_960,
)
"""The shape of Qwen3-4B."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One model with random weights: what every engine serves."""

    model: ModelConfig
    device: torch.device
    dtype: Literal["fp32", "bf16"] = "fp32"
    weights: Mapping[str, Tensor] | None = None
    """Canonical parameters; None where only the engine serves: it draws its storages in place."""

    @classmethod
    def random(cls, model: ModelConfig, device: str) -> Subject:
        """Draw the weights as for a new model."""
        return cls(model, torch.device(device), weights=random_init(model, InitConfig(), 0))

    def engine(
        self, max_running: int, *, has_end: bool = True, runner: Runner | None = None
    ) -> Engine:
        """Return a new engine of at most ``max_running`` trajectories at once.

        Args:
            has_end: whether the end token can be sampled. Without, responses end at their limit
                of tokens, as with ``ignore_eos`` elsewhere.
            runner: holds the model; by default one of its own.
        """
        vocabulary = VOCABULARY if has_end else replace(VOCABULARY, eos=self.model.vocab_size)
        config = self.config(max_running)
        engine = EmbeddedEngine(self.model, config, vocabulary, device=self.device, runner=runner)
        storages = engine.staging()
        if self.weights is None:
            for storage in storages.values():
                storage.normal_(0, 0.02)
        else:
            load_tiles(engine_layout(self.model).ranks[0], box_reader(self.weights), storages)
        engine.commit(1)
        return engine

    def config(self, max_running: int) -> EngineConfig:
        """Return what :meth:`engine` is configured with."""
        return EngineConfig(dtype=self.dtype, max_running=max_running, num_kv_slots=32_768)

    def write(self, folder: Path) -> None:
        """Write the model as HF folder."""
        assert self.weights is not None
        write_hf(folder, self.model, self.weights)

    def now(self) -> float:
        """Seconds: of this process on a CPU (whoever else is busy), elapsed ones elsewhere."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def hf_model(folder: Path) -> Any:
    """Return the model of ``folder`` in transformers, with its fastest attention on a CPU."""
    disable_progress_bar()
    return Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
