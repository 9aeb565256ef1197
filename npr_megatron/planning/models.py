"""Shapes of models that people ask for by name; any other model by its HF folder."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from npr_megatron.config.hf_architecture import read_architecture
from npr_megatron.config.model import ModelConfig, MoeConfig
from npr_megatron.errors import ConfigError


def _qwen3(layers: int, hidden: int, heads: int, inner: int, *, is_tied: bool) -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=inner,
        vocab_size=151_936,
        rope_theta=1e6,
        tie_word_embeddings=is_tied,
        max_position_embeddings=40_960,
    )


def _qwen3_moe(layers: int, hidden: int, heads: int, inner: int, expert_inner: int) -> ModelConfig:
    return ModelConfig(
        family="qwen3_moe",
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=inner,
        vocab_size=151_936,
        rope_theta=1e6,
        tie_word_embeddings=False,
        max_position_embeddings=40_960,
        moe=MoeConfig(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=expert_inner),
    )


def _llama3(layers: int, hidden: int, heads: int, inner: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=inner,
        vocab_size=128_256,
        rope_theta=500_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        max_position_embeddings=131_072,
        has_qk_norm=False,
    )


KNOWN_MODELS: dict[str, ModelConfig] = {
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, is_tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, is_tied=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, is_tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12_288, is_tied=False),
    "qwen3-14b": _qwen3(40, 5120, 40, 17_408, is_tied=False),
    "qwen3-32b": _qwen3(64, 5120, 64, 25_600, is_tied=False),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 32, 6144, 768),
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 64, 12_288, 1536),
    "llama-3.1-8b": _llama3(32, 4096, 32, 14_336),
    "llama-3.1-70b": _llama3(80, 8192, 64, 28_672),
}
"""By the names of their HF repositories, in lower case. Shapes only: rope scaling is left out."""


def model_of(name_or_folder: str) -> ModelConfig:
    """Return a known model (any case), or the one described by an HF folder.

    Raises:
        ConfigError: neither a known name nor a folder; the message lists the names.
        InputError: the folder's ``config.json`` describes a model that cannot be laid out.
    """
    known = KNOWN_MODELS.get(name_or_folder.lower())
    if known is not None:
        return known
    if Path(name_or_folder).is_dir():
        return read_architecture(name_or_folder)
    near = get_close_matches(name_or_folder.lower(), KNOWN_MODELS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"model {name_or_folder!r} is no known name and no folder; {hint}known are "
        f"{', '.join(KNOWN_MODELS)}; or give an HF folder with a config.json"
    )
