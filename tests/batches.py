"""Batches over pools with a past: prompts shared by rollouts, forks, joins, rows of any length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from npr_megatron.engine.compute.model import EngineModel
from npr_megatron.engine.flow.flow import Flow, Stream
from npr_megatron.engine.flow.segment import Segment
from npr_megatron.engine.memory.pool import SlotPool
from npr_megatron.engine.schedule.batch import Batch, assemble
from npr_megatron.engine.schedule.feed import Feed
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import DecodeMode
from npr_megatron.schema.grammar import Grammar
from tests.structures import SMALL

FLOW = Flow(
    GenerationRequest(
        prompt_id="p",
        rollout=0,
        prompt_ids=(20,),
        mode=DecodeMode.PARALLEL,
        max_new_tokens=10,
        max_critical_path=10,
        seed=0,
    ),
    Grammar(SMALL),
    SMALL.eos,
)


def stream_on(row: int, token_id: int, position: int) -> Stream:
    """A stream of ``row`` whose last token is to be fed."""
    segment = Segment(0, 0)
    segment.append(token_id, position, False, 0.0, 0)
    return Stream(FLOW, segment, FLOW.grammar.start, key=0, row=row)


def rows_of_lengths(pool: SlotPool, lengths: Sequence[int]) -> list[int]:
    """Open a row of each length, nothing shared."""
    rows = [pool.open_row(None, length + 400) for length in lengths]
    for row, length in zip(rows, lengths, strict=True):
        if length:
            pool.append(row, length)
    return rows


def grown_rows(rng: np.random.Generator, pool: SlotPool, *, longest: int) -> list[int]:
    """Open prompts, rollouts that share them, branches that share these; join some; return the rows
    that may be decoded.
    """
    decoding: list[int] = []
    for _ in range(int(rng.integers(1, 4))):
        prompt = pool.open_row(None, longest)
        pool.append(prompt, int(rng.integers(1, longest // 2)))
        for _ in range(int(rng.integers(1, 4))):
            trunk = pool.open_row(prompt, 4 * longest)
            pool.append(trunk, int(rng.integers(1, longest // 8)))
            if rng.random() < 0.3:
                decoding.append(trunk)
                continue
            branches = [pool.open_row(trunk, 4 * longest) for _ in range(int(rng.integers(2, 5)))]
            for branch in branches:
                pool.append(branch, int(rng.integers(1, longest // 8)))
            if rng.random() < 0.4:
                pool.absorb(trunk, branches)
                decoding.append(trunk)
            else:
                decoding += branches
    rng.shuffle(decoding)
    return decoding


def decode_batch(
    rng: np.random.Generator, pool: SlotPool, rows: Sequence[int], model: EngineModel
) -> Batch:
    """The batch that feeds one random token to each of ``rows``."""
    config = model.config
    streams = [
        stream_on(
            row,
            int(rng.integers(config.vocab_size)),
            int(rng.integers(config.max_position_embeddings)),
        )
        for row in rows
    ]
    return assemble(streams, [], pool)[0]


def feed_on(rng: np.random.Generator, pool: SlotPool, row: int, num_tokens: int) -> Feed:
    """A causal run of random tokens behind ``row``, all but the first scored."""
    segment = Segment(0, 0)
    for _ in range(num_tokens):
        segment.append(int(rng.integers(20, 40)), int(rng.integers(200)), False, 0.0, 0)
    return Feed.of_tail(segment, num_tokens, row, pool)


def replayed(rng: np.random.Generator, pool: SlotPool, num_shared: int) -> Feed:
    """A tree of two branches behind ``num_shared`` tokens in the pool."""
    block = np.array([0] * 10 + [1] * 9 + [0] * 3, np.int32)
    branch = np.array([0] * 10 + [1] * 4 + [2] * 5 + [0] * 3, np.int32)
    row = pool.open_row(None, len(block))
    slots = pool.append(row, len(block))
    tokens = rng.integers(20, 40, size=len(block)).astype(np.int32)
    labels = {"token_ids": tokens, "position_ids": tokens, "block": block, "branch": branch}
    return Feed.of_tree(labels, slots, num_shared)


def scatter_cache(model: EngineModel, seed: int) -> None:
    """Fill every slot of every layer, the dummy included, with other random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    for cache in model.kv_cache:
        cache.copy_(torch.randn(cache.shape, generator=generator))
