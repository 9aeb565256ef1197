"""The rollouts of tools/bench_sglang.py, what a client without native branches makes of one, and
what decoding them took.

A rollout is a prompt and the response that every side writes: a teacher dictates it to the NPR
engines; to SGLang as it is, it gives the lengths of the pieces, which are sampled freely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from bench_engine_models import VOCABULARY, WORDS
from bench_engine_parallel import response_of

from npr_megatron.topology.layout import layout_of

GROUP = 8
"""Rollouts of a prompt, as a trainer asks for them."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A prompt and the response to it."""

    prompt: tuple[int, ...]
    response: list[int]


def rollouts(
    num_rollouts: int, prompt_tokens: int, branches: Sequence[int], step_tokens: int, seed: int
) -> list[Rollout]:
    """Return responses of two blocks to prompts that ``GROUP`` neighbours share.

    Args:
        branches: numbers of branches, in turn.
        step_tokens: tokens of text per branch, give or take a quarter.
        seed: other seeds give other texts, which no cache can know.
    """
    rng = np.random.default_rng(seed)
    drawn: list[Rollout] = []
    for number in range(num_rollouts):
        if number % GROUP == 0:
            prompt = tuple(rng.choice(WORDS, prompt_tokens).tolist())
        num_branches = branches[number % len(branches)]
        own = int(rng.integers(2**32))
        response = response_of(num_branches, step_tokens, step_tokens // 4, own)
        drawn.append(Rollout(prompt, response))
    return drawn


@dataclass(frozen=True, slots=True)
class Piece:
    """Known text, and how many tokens are sampled behind it."""

    given: tuple[int, ...]
    num_sampled: int


@dataclass(frozen=True, slots=True)
class Script:
    """A rollout as requests: a piece of the trunk, the branches behind it, the next piece."""

    prompt: tuple[int, ...]
    trunk: list[Piece]
    """One more than there are blocks."""
    blocks: list[list[Piece]]


def script_of(rollout: Rollout) -> Script:
    """Cut a rollout where requests begin and end.

    Forced tokens are never sampled: those that open a piece are given with it, the newline that
    ends a branch with whatever follows, the one before a fork with each branch.
    """
    prompt, response = rollout.prompt, rollout.response
    layout = layout_of([*prompt, *response], len(prompt), VOCABULARY)
    start = len(prompt)
    labels = zip(
        layout.block[start:].tolist(),
        layout.branch[start:].tolist(),
        layout.forced[start:].tolist(),
        response,
        strict=True,
    )
    script = Script(prompt, [], [])
    for (block, branch), tokens in groupby(labels, key=lambda token: token[:2]):
        forced, token_ids = zip(*(token[2:] for token in tokens), strict=True)
        num_given = forced.index(False)
        piece = Piece(tuple(token_ids[:num_given]), forced.count(False))
        if block == 0:
            script.trunk.append(piece)
        elif branch == 1:
            script.blocks.append([piece])
        else:
            script.blocks[-1].append(piece)
    return script


@dataclass(slots=True)
class Report:
    """What it took to decode some rollouts."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    """Of each rollout, from the moment it is one of those in flight."""
    joins_s: list[float] = field(default_factory=list)
    """From the last token of the last branch of a block to the first token sampled behind it, as
    the caller sees them; of watched rollouts."""
    num_known: int = 0
    """Tokens that were sent as known: prompts, and with every request all text before it."""
    num_cached: int = 0
    """How many of them had keys and values already."""
    num_computed: int = 0
    """Tokens that went through the model."""
