"""A model that speaks the tag language by construction, so that tests need no trained one.

One layer of real Qwen3: its two heads look one and three positions back, the head of the model adds
what the current token and these two have to say about the next one. That is enough to open blocks,
number up to three plans, write steps, takeaways and a conclusion of random letters and lengths, and
to end. Each part has letters of its own: plans a-c, steps d-k, takeaways l-r, conclusions s-z.

It asks for temperature 1: greedily it repeats a letter for ever.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from npr_megatron.config.model import InitConfig, ModelConfig
from npr_megatron.data.sums_tokenizer import EOS, SUMS_TOKENS, build_sums_tokenizer
from npr_megatron.schema.tags import Tag
from npr_megatron.weights.checkpoints.hf import random_init, write_hf

SPEAKER = ModelConfig(
    num_hidden_layers=1,
    hidden_size=256,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    intermediate_size=32,
    vocab_size=len(SUMS_TOKENS),
    max_position_embeddings=1024,
    tie_word_embeddings=False,
)
_LOOKS_BACK = (1, 3)
_NUM_PAIRS = 16
"""Rotary pairs that measure distances."""
_SHARPNESS = 5.5
_CONSTANT = 192
"""Channel that is 1 everywhere; before it 64 for the token, and 64 for what each head brings."""
_PUSH = 20.0
_NEVER = -4 * _PUSH
_PLAN, _STEP = "abc", "defghijk"
_TAKEAWAY, _CONCLUSION = "lmnopqr", "stuvwxyz"
Table = dict[str, dict[str, float]]


def write_speaker(folder: Path, end: float = 0.15, again: float = 0.35) -> Path:
    """Write the model as an HF folder.

    Args:
        end: probability that a text ends behind each of its letters.
        again: probability that another block follows.
    """
    write_hf(folder, SPEAKER, _tensors(end, again))
    build_sums_tokenizer(folder)
    return folder


def _tensors(end: float, again: float) -> dict[str, Tensor]:
    tensors = random_init(SPEAKER, InitConfig(), seed=0)
    num_tokens = len(SUMS_TOKENS)
    embedding = torch.zeros(num_tokens, SPEAKER.hidden_size)
    embedding[:, :num_tokens] = torch.eye(num_tokens)
    embedding[:, _CONSTANT] = 1.0
    tensors["model.embed_tokens.weight"] = embedding
    entry = math.sqrt(SPEAKER.hidden_size / 2)  # of what is 1, behind the first norm
    attention = "model.layers.0.self_attn."
    for name, rows in (("q_proj", 128), ("k_proj", 64), ("v_proj", 64)):
        tensors[f"{attention}{name}.weight"] = torch.zeros(rows, SPEAKER.hidden_size)
    query, key = tensors[f"{attention}q_proj.weight"], tensors[f"{attention}k_proj.weight"]
    frequencies = SPEAKER.rope_theta ** (-torch.arange(_NUM_PAIRS) / 32)
    key[:_NUM_PAIRS, _CONSTANT] = 1.0
    for head, distance in enumerate(_LOOKS_BACK):
        first = 64 * head
        query[first : first + _NUM_PAIRS, _CONSTANT] = torch.cos(frequencies * distance)
        query[first + 32 : first + 32 + _NUM_PAIRS, _CONSTANT] = -torch.sin(frequencies * distance)
    for name in ("q_norm", "k_norm"):
        tensors[f"{attention}{name}.weight"] = torch.full((64,), _SHARPNESS)
    tensors[f"{attention}v_proj.weight"][:, :64] = torch.eye(64) / entry
    output = torch.zeros(SPEAKER.hidden_size, 128)
    output[64:192] = torch.eye(128)
    tensors[f"{attention}o_proj.weight"] = output
    tensors["model.layers.0.mlp.down_proj.weight"].zero_()
    tensors["lm_head.weight"] = _head(end, again) / math.sqrt(SPEAKER.hidden_size / 4)
    return tensors


def _head(end: float, again: float) -> Tensor:
    """Return [token, channel] what each channel adds to the logit of each token."""
    head = torch.zeros(len(SUMS_TOKENS), SPEAKER.hidden_size)
    ids = {token: index for index, token in enumerate(SUMS_TOKENS)}
    followers = _followers(end)
    for token in SUMS_TOKENS:
        head[:, ids[token]] = _NEVER if token in followers else 0.0
    for first, table in ((0, followers), (64, _pushes(again)), (128, _far_pushes())):
        for token, row in table.items():
            for follower, value in row.items():
                head[ids[follower], first + ids[token]] = value
    return head


def _followers(end: float) -> Table:
    """What may stand behind a token."""
    newline = _all([*Tag, *_TAKEAWAY, *_CONCLUSION], 0.0) | _all("123", -2 * _PUSH)
    table: Table = {"\n": newline, ":": _all(_PLAN + _STEP, 0.0)}
    table |= {tag: {"\n": 0.0} for tag in Tag if tag is not Tag.PLAN_OPEN}
    table[Tag.PLAN_OPEN] = {"1": _PUSH, "2": 0.0, "3": 0.0}
    table |= {digit: {":": 0.0} for digit in "123"}
    table |= {letter: {letter: 0.0, Tag.PLAN_CLOSE: 0.0} for letter in _PLAN}
    for letters, closing in (
        (_STEP, Tag.STEP_CLOSE),
        (_TAKEAWAY, Tag.TAKEAWAY_CLOSE),
        (_CONCLUSION, EOS),
    ):
        share = math.log(end / (1 - end) * len(letters))
        for letter in letters:
            table[letter] = _all(letters, 0.0) | {closing: share}
    return table


def _pushes(again: float) -> Table:
    """What the token before speaks for."""
    table: Table = defaultdict(dict)
    for token, followers in (
        ("?", [Tag.GUIDELINE_OPEN]),
        (Tag.GUIDELINE_OPEN, [Tag.PLAN_OPEN]),
        (Tag.PLAN_CLOSE, [Tag.PLAN_OPEN, Tag.GUIDELINE_CLOSE]),
        (Tag.GUIDELINE_CLOSE, [Tag.STEP_OPEN]),
        (Tag.STEP_CLOSE, [Tag.TAKEAWAY_OPEN]),
        (Tag.TAKEAWAY_OPEN, _TAKEAWAY),
        (Tag.TAKEAWAY_CLOSE, _CONCLUSION),
        ("1", "a"),
        ("2", "b"),
        ("3", "c"),
        (":", _PLAN),
    ):
        table[token] = _all(followers, _PUSH)
    table[Tag.STEP_OPEN]["1"] = 3 * _PUSH
    share = math.log(again / (1 - again) * len(_CONCLUSION))
    table[Tag.TAKEAWAY_CLOSE][Tag.GUIDELINE_OPEN] = _PUSH + share
    table |= {letter: {Tag.PLAN_CLOSE: _PUSH} for letter in _PLAN}
    return table


def _far_pushes() -> Table:
    """What the token three places before speaks for."""
    return {
        "a": {"2": 2 * _PUSH},
        "b": {"3": 2 * _PUSH},
        "c": {Tag.GUIDELINE_CLOSE: 2 * _PUSH},
        Tag.STEP_OPEN: _all(_STEP, 2 * _PUSH),
    }


def _all(tokens: Iterable[str], value: float) -> dict[str, float]:
    return dict.fromkeys(tokens, value)
