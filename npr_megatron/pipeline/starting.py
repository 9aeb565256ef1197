"""What a model is started from: random weights on disk, and a tokenizer that fits its rows."""

from __future__ import annotations

from pathlib import Path

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.run import ModelSection
from npr_megatron.data.tokenizer import Tokenizer
from npr_megatron.errors import InputError


def random_model(folder: Path, section: ModelSection, seed: int, tokenizer_folder: Path) -> Path:
    """Return ``folder`` with the random model of ``section``, written there on first use."""
    from npr_megatron.weights.checkpoints.hf import random_init, write_hf  # needs torch

    assert section.architecture is not None, "the checker demands a model"
    if not folder.exists():
        tensors = random_init(section.architecture, section.init, seed)
        write_hf(folder, section.architecture, tensors, source_folder=tokenizer_folder)
    return folder


def require_rows(model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    Raises:
        InputError: it has more tokens than the model has rows.
    """
    if tokenizer.num_tokens > model.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.num_tokens} tokens and the model {model.vocab_size} "
            "embedding rows; use the tokenizer the model was made with, or raise vocab_size"
        )
