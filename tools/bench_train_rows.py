"""What tools/bench_train.py trains on: random trajectories with branches, of given lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npr_megatron.config.training import LossConfig
from npr_megatron.data.packing import pack
from npr_megatron.data.samples import sft_sample
from npr_megatron.records.sample import TrainingSample
from npr_megatron.topology.cursor import TopologyCursor
from npr_megatron.topology.layout import BranchLayout, predecessors
from npr_megatron.train.step import StepBatch

TOKENS_PER_BLOCK = 1000
"""A trajectory has one block per that many tokens, and at least one."""
_BRANCHES = (2, 5)
"""A block has from the first to the last number of branches."""


def trajectory(rng: np.random.Generator, num_tokens: int, vocab_size: int) -> TrainingSample:
    """Return a sample of exactly ``num_tokens``: an eighth of it prompt, then trunk and blocks of
    branches in turns; about three quarters of the response stand in branches.
    """
    prompt = max(num_tokens // 8, 1)
    response = num_tokens - prompt
    num_blocks = max(response // TOKENS_PER_BLOCK, 1)
    cursor = TopologyCursor()
    places = [cursor.place_trunk() for _ in range(prompt)]
    for block_tokens in _cut(rng, response, num_blocks):
        trunk = max(block_tokens // 4, 1)
        places += [cursor.place_trunk() for _ in range(trunk // 2)]
        branches = _cut(rng, block_tokens - trunk, int(rng.integers(*_BRANCHES, endpoint=True)))
        if branches:
            cursor.fork(len(branches))
            for number, length in enumerate(branches, start=1):
                places += [cursor.place_branch(number) for _ in range(length)]
            cursor.join()
        places += [cursor.place_trunk() for _ in range(trunk - trunk // 2)]
    position_ids, block, branch = np.array(places, dtype=np.int32).T.copy()
    layout = BranchLayout(
        position_ids=position_ids,
        block=block,
        branch=branch,
        predecessor=predecessors(block, branch),
        forced=np.arange(num_tokens) < prompt,
    )
    return sft_sample(rng.integers(0, vocab_size, num_tokens), prompt, layout)


def _cut(rng: np.random.Generator, num_tokens: int, count: int) -> list[int]:
    """Cut ``num_tokens`` into at most ``count`` unequal pieces of one token or more."""
    count = min(count, num_tokens)
    if count == 0:
        return []
    shares = rng.uniform(0.5, 1.5, count)
    ends = np.maximum(np.cumsum(shares) / shares.sum() * num_tokens, np.arange(1, count + 1))
    return np.diff(ends.astype(np.int64), prepend=0).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One optimizer step."""

    name: str
    lengths: tuple[int, ...]
    """Tokens of each trajectory."""
    row_tokens: int
    rows_per_microbatch: int

    def batch(self, vocab_size: int) -> StepBatch:
        """Return trajectories of these lengths, packed for one rank."""
        rng = np.random.default_rng(0)
        samples = [trajectory(rng, length, vocab_size) for length in self.lengths]
        microbatches = pack(samples, self.row_tokens, self.rows_per_microbatch, 1)
        return StepBatch(microbatches=microbatches, loss=LossConfig(kind="sft"))


def reasoning_lengths(kind: str, longest: int, count: int = 6000) -> np.ndarray:
    """Return lengths [tokens] as they are drawn from data: log-normal, cut at ``longest``.

    ``answers`` have a median of 1,800 tokens and a long tail, as chains of thought do; ``turns``
    are short chat; ``mix`` is half and half; ``limit`` are long rollouts of which a fifth ran into
    the limit.
    """
    rng = np.random.default_rng(7)
    answers = rng.lognormal(np.log(1800), 0.7, count)
    turns = rng.lognormal(np.log(220), 1.0, count)
    drawn = {
        "answers": answers,
        "turns": turns,
        "mix": np.where(rng.random(count) < 0.5, answers, turns),
        "limit": rng.lognormal(np.log(longest * 0.55), 0.7, count),
    }
    return np.clip(drawn[kind], 16, longest).astype(np.int64)
