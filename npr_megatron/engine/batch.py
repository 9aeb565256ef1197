"""Lays streams and feeds out as one flat batch for the model.

Streams that feed a single token come first, as one group of one-query rows; feeds follow in groups
of similar length, each padded to its own longest, so a prompt of hundreds of tokens does not pad a
header of four.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from npr_megatron.engine.attention import QueryGroup
from npr_megatron.engine.flow import Stream
from npr_megatron.engine.pool import SlotPool
from npr_megatron.engine.segment import Feed, Segment


@dataclass(frozen=True, slots=True, eq=False)
class RaggedBatch:
    """T tokens of many streams, and which of their M logits matter.

    The logits listed by ``logit_index`` are first the sampled ones, aligned with ``sampled``, then
    the scored ones, aligned with ``scored``.
    """

    token_ids: Tensor
    position_ids: Tensor
    slots: Tensor
    groups: list[QueryGroup]
    logit_index: Tensor
    sampled: list[Stream]
    scored: list[tuple[Segment, int]]


def assemble(
    streams: Sequence[Stream], feeds: Sequence[Feed], pool: SlotPool, device: torch.device
) -> RaggedBatch:
    """Return the batch that feeds the last token of each stream, and all of ``feeds``.

    Appends one slot to the row of every stream; feeds bring theirs.
    """
    groups: list[QueryGroup] = []
    token_ids = [stream.segment.token_ids[-1] for stream in streams]
    position_ids = [stream.segment.position_ids[-1] for stream in streams]
    slots: list[np.ndarray] = []
    if streams:
        rows = np.array([stream.row for stream in streams], dtype=np.int64)
        slots.append(pool.append_one_each(rows))
        groups.append(_single_group(rows, pool, device))
    sampled, logit_index = list(streams), list(range(len(streams)))
    scored: list[tuple[Segment, int]] = []
    scored_index: list[int] = []
    for bucket in _buckets(feeds):
        start = len(token_ids)
        groups.append(_feed_group(bucket, start, device))
        for feed in bucket:
            scored += feed.scored
            scored_index += range(start, start + len(feed.scored))
            start += len(feed.token_ids)
            if feed.sampled is not None:
                sampled.append(feed.sampled)
                logit_index.append(start - 1)
            token_ids += feed.token_ids
            position_ids += feed.position_ids
            slots.append(feed.slots)
    return RaggedBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64).to(device),
        position_ids=torch.tensor(position_ids, dtype=torch.int64).to(device),
        slots=torch.from_numpy(np.concatenate(slots).astype(np.int64)).to(device),
        groups=groups,
        logit_index=torch.tensor(logit_index + scored_index, dtype=torch.int64).to(device),
        sampled=sampled,
        scored=scored,
    )


def _single_group(rows: np.ndarray, pool: SlotPool, device: torch.device) -> QueryGroup:
    lengths = pool.length[rows]
    longest = int(lengths.max())
    keys = pool.table[rows, :longest]
    visible = None
    if int(lengths.min()) != longest:
        visible = np.arange(longest) < lengths[:, None]
        visible = torch.from_numpy(visible).to(device)[:, None, None]
    return QueryGroup(
        start=0,
        count=len(rows),
        num_rows=len(rows),
        keys=torch.from_numpy(keys.reshape(-1)).to(device),
        visible=visible,
    )


def _buckets(feeds: Sequence[Feed]) -> Iterable[list[Feed]]:
    """Group feeds whose lengths share a power of two, in a fixed order."""
    buckets: dict[int, list[Feed]] = {}
    for feed in feeds:
        buckets.setdefault((len(feed.token_ids) - 1).bit_length(), []).append(feed)
    return [buckets[size] for size in sorted(buckets)]


def _feed_group(feeds: Sequence[Feed], start: int, device: torch.device) -> QueryGroup:
    counts = np.array([len(feed.token_ids) for feed in feeds])
    num_queries, longest = int(counts.max()), max(len(feed.readable) for feed in feeds)
    keys = np.zeros((len(feeds), longest), dtype=np.int32)
    visible = np.zeros((len(feeds), num_queries, longest), dtype=np.bool_)
    for index, feed in enumerate(feeds):
        count, length = len(feed.token_ids), len(feed.readable)
        keys[index, :length] = feed.readable
        visible[index, :count, :length] = _visible(feed)
        visible[index, count:, 0] = True  # padding: no softmax over nothing
    padded = kept = None
    if counts.min() != num_queries:
        offsets = np.arange(num_queries)
        firsts = np.concatenate([[0], counts.cumsum()[:-1]])
        padded_index = firsts[:, None] + np.minimum(offsets, counts[:, None] - 1)
        padded = torch.from_numpy(padded_index.reshape(-1)).to(device)
        kept = torch.from_numpy(np.flatnonzero(offsets < counts[:, None])).to(device)
    return QueryGroup(
        start=start,
        count=int(counts.sum()),
        num_rows=len(feeds),
        keys=torch.from_numpy(keys.reshape(-1)).to(device),
        visible=torch.from_numpy(visible).to(device)[:, None],
        padded=padded,
        kept=kept,
    )


def _visible(feed: Feed) -> np.ndarray:
    """[tokens, readable]: the explicit mask, or causal from the end of the row."""
    if feed.attention_mask is not None:
        return feed.attention_mask
    count, length = len(feed.token_ids), len(feed.readable)
    return np.arange(length) <= np.arange(length - count, length)[:, None]
