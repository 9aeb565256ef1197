"""Lays streams and feeds out as one flat batch for the model.

Streams that feed a single token come first, sorted by length and cut where that pays; feeds follow
in groups of similar length, each padded to its own longest, so a prompt of hundreds of tokens does
not pad a header of four.
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

_LENGTH_RATIO = 0.75
"""Rows shorter than this share of the longest may be read as a group of their own ..."""
_MIN_SAVED_TOKENS = 1024
"""... if that saves reading so many slots: below, a group's own kernels cost more (measured on
CPU).
"""


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
    groups, slots, order = _place_streams(streams, pool, device)
    segments = [streams[index].segment for index in order]
    token_ids = [segment.token_ids[-1] for segment in segments]
    position_ids = [segment.position_ids[-1] for segment in segments]
    # Attention wants rows sorted by length, results are wanted in the order given.
    sampled, logit_index = list(streams), np.argsort(order).tolist()
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


def _place_streams(
    streams: Sequence[Stream], pool: SlotPool, device: torch.device
) -> tuple[list[QueryGroup], list[np.ndarray], list[int]]:
    """Append one slot per stream; return groups of rows of similar length, the slots, the order."""
    if not streams:
        return [], [], []
    rows = np.array([stream.row for stream in streams], dtype=np.int64)
    order = np.argsort(pool.length[rows], kind="stable")
    rows = rows[order]
    slots = pool.append_one_each(rows)
    lengths = pool.length[rows]
    groups = [
        _single_group(rows[start:stop], lengths[start:stop], start, pool, device)
        for start, stop in _length_ranges(lengths)
    ]
    return groups, [slots], order.tolist()


def _length_ranges(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Cut ascending ``lengths`` where reading the shorter rows apart pays."""
    ranges: list[tuple[int, int]] = []
    stop = len(lengths)
    while stop:
        longest = int(lengths[stop - 1])
        start = int(np.searchsorted(lengths[:stop], longest * _LENGTH_RATIO))
        if start and start * (longest - int(lengths[start - 1])) < _MIN_SAVED_TOKENS:
            start = 0
        ranges.append((start, stop))
        stop = start
    return ranges[::-1]


def _single_group(
    rows: np.ndarray, lengths: np.ndarray, start: int, pool: SlotPool, device: torch.device
) -> QueryGroup:
    longest = int(lengths[-1])
    keys = pool.table[rows, :longest]
    visible = None
    if int(lengths[0]) != longest:
        visible = torch.from_numpy(np.arange(longest) < lengths[:, None]).to(device)[:, None, None]
    return QueryGroup(
        start=start,
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
        visible[index, count:, 0] = True  # no softmax over nothing
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
