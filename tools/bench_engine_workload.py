"""Requests of spread lengths, and how the engine and HF ``generate`` serve them.

A response has a planned length and no end token, so that all engines generate equally many tokens
and the ratio of their times is the ratio of their useful tokens per second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from bench_engine_models import WORDS

from npr_megatron.engine.interface import Engine
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import DecodeMode

_FRESH = count()
"""Numbers of the prompts drawn so far: none is served twice by accident."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts and the lengths of their responses, in order of arrival."""

    prompts: Sequence[tuple[int, ...]]
    lengths: Sequence[int]
    group: int = 1
    """Neighbours that share a prompt."""

    @classmethod
    def of(cls, prompt_lengths: Sequence[int], lengths: Sequence[int], group: int = 1) -> Workload:
        """Draw prompts that were never drawn before, one for each ``group`` requests."""
        rng = np.random.default_rng(next(_FRESH))
        drawn = [tuple(rng.choice(WORDS, size).tolist()) for size in prompt_lengths[::group]]
        return cls([prompt for prompt in drawn for _ in range(group)], lengths, group)

    @classmethod
    def spread(cls, num_requests: int, longest: int) -> Workload:
        """Draw prompts of 16 to 96 tokens and responses from an eighth of ``longest`` to it,
        uniformly; equal arguments give equal lengths.
        """
        rng = np.random.default_rng(num_requests)
        prompt_lengths = rng.integers(16, 97, num_requests).tolist()
        return cls.of(
            prompt_lengths, rng.integers(longest // 8, longest + 1, num_requests).tolist()
        )

    def renewed(self) -> Workload:
        """Return fresh prompts of the same lengths: no cache of prompts can know them."""
        return Workload.of(self.prompt_lengths, self.lengths, self.group)

    @property
    def prompt_lengths(self) -> list[int]:
        """Tokens per prompt."""
        return [len(prompt) for prompt in self.prompts]

    @property
    def num_tokens(self) -> int:
        """Useful tokens: those of the responses."""
        return sum(self.lengths)

    def batches(self, size: int) -> Iterator[Workload]:
        """Cut into batches in order of arrival."""
        for start in range(0, len(self.prompts), size):
            rows = slice(start, start + size)
            yield Workload(self.prompts[rows], self.lengths[rows])


def requests_of(workload: Workload) -> list[GenerationRequest]:
    """Return sequential requests that sample as the weights say."""
    return [
        GenerationRequest(
            prompt_id=str(number),
            rollout=0,
            prompt_ids=prompt,
            mode=DecodeMode.SEQUENTIAL,
            max_new_tokens=length,
            max_critical_path=length,
            seed=number,
        )
        for number, (prompt, length) in enumerate(
            zip(workload.prompts, workload.lengths, strict=True)
        )
    ]


def serve(engine: Engine, workload: Workload) -> None:
    """Sample every response by continuous batching."""
    trajectories = engine.generate(requests_of(workload))
    require_equal(sum(trajectory.num_tokens for trajectory in trajectories), workload.num_tokens)


@torch.inference_mode()
def serve_by_hf(
    hf: Any, workload: Workload, batch: int, cache: Literal["dynamic", "static"]
) -> None:
    """Sample every response by static batches, each padded on the left and decoded until its
    longest response ends.
    """
    num_tokens = 0
    for part in workload.batches(batch):
        width, longest = max(map(len, part.prompts)), max(part.lengths)
        padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in part.prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part.prompts]
        out = hf.generate(
            torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            max_new_tokens=longest,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation=cache,
        )
        require_equal(out.shape[1], width + longest)
        num_tokens += sum(part.lengths)
    require_equal(num_tokens, workload.num_tokens)


def require_equal(found: int, planned: int) -> None:
    """Stop a measurement that did not decode what it was to decode."""
    if found != planned:
        raise SystemExit(f"{planned} tokens were to be measured, but there are {found}")
