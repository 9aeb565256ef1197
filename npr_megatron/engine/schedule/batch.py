"""Lays streams and feeds out as one flat batch for the model. numpy only; a batch can be pickled.

Streams that feed a single token come first, sorted by length and cut where that pays; feeds follow
in groups of similar length, each padded to its own longest, so a prompt of hundreds of tokens does
not pad a header of four.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npr_megatron.engine.flow.flow import Stream
from npr_megatron.engine.flow.segment import Segment
from npr_megatron.engine.memory.pool import SlotPool
from npr_megatron.engine.schedule.feed import DecodeStream, Feed
from npr_megatron.records.trajectory import BoolArray

IndexArray = npt.NDArray[np.int64]

_LENGTH_RATIO = 0.75
"""Rows shorter than this share of the longest may be read as a group of their own ..."""
_MIN_SAVED_TOKENS = 1024
"""... if that saves reading so many slots: below, a group's own kernels cost more (measured on
CPU).
"""


@dataclass(frozen=True, slots=True, eq=False)
class QueryGroup:
    """B rows of S queries each (ragged rows padded), reading L slots each.

    The group's tokens are ``start .. start + count`` of the flat batch, row after row.
    """

    start: int
    count: int
    keys: IndexArray
    """[B, L] slots, padded with any slot."""
    visible: BoolArray | None
    """[B, 1 or S, L]; None where every query sees all L."""
    padded: IndexArray | None = None
    """[B * S] offset of each padded query inside the group; None where no row is padded."""
    kept: IndexArray | None = None
    """[count] index into B * S of the queries that are real; None where no row is padded."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one forward pass computes: T tokens of many streams, and which M logits matter."""

    token_ids: IndexArray
    """[T]"""
    position_ids: IndexArray
    """[T] logical positions."""
    slots: IndexArray
    """[T] where each token's keys and values are written, all distinct."""
    groups: list[QueryGroup]
    """Partition of 0..T into consecutive ranges, in order."""
    logit_index: IndexArray
    """[M] tokens whose logits matter: first the sampled, then the scored."""


def assemble(
    streams: Sequence[DecodeStream], feeds: Sequence[Feed], pool: SlotPool
) -> tuple[Batch, list[Stream], list[tuple[Segment, int]]]:
    """Return the batch that feeds the last token of each stream, and all of ``feeds``.

    Appends one slot to the row of every stream; feeds bring theirs.

    Returns:
        The batch, the streams that take a sample from its first logits, and the known tokens that
        the other logits predict.
    """
    groups, slots, order = _place_streams(streams, pool)
    segments = [streams[index].stream.segment for index in order]
    token_ids = [np.array([segment.token_ids[-1] for segment in segments], np.int64)]
    position_ids = [np.array([segment.position_ids[-1] for segment in segments], np.int64)]
    # Attention wants rows sorted by length, results are wanted in the order given.
    sampled, logit_index = [item.stream for item in streams], np.argsort(order).tolist()
    scored: list[tuple[Segment, int]] = []
    scored_index: list[int] = []
    start = len(streams)
    for bucket in _buckets(feeds):
        groups.append(_feed_group(bucket, start))
        for feed in bucket:
            scored += feed.scored
            scored_index += range(start, start + len(feed.scored))
            start += len(feed.token_ids)
            if feed.sampled is not None:
                sampled.append(feed.sampled)
                logit_index.append(start - 1)
            token_ids.append(np.asarray(feed.token_ids, np.int64))
            position_ids.append(np.asarray(feed.position_ids, np.int64))
            slots.append(feed.slots)
    batch = Batch(
        token_ids=np.concatenate(token_ids),
        position_ids=np.concatenate(position_ids),
        slots=np.concatenate(slots).astype(np.int64),
        groups=groups,
        logit_index=np.array(logit_index + scored_index, np.int64),
    )
    return batch, sampled, scored


def _place_streams(
    streams: Sequence[DecodeStream], pool: SlotPool
) -> tuple[list[QueryGroup], list[np.ndarray], list[int]]:
    """Append one slot per stream; return groups of rows of similar length, the slots, the order."""
    if not streams:
        return [], [], []
    rows = np.array([item.row for item in streams], dtype=np.int64)
    order = np.argsort(pool.length[rows], kind="stable")
    rows = rows[order]
    slots = pool.append_one_each(rows)
    lengths = pool.length[rows]
    groups = [
        _single_group(rows[start:stop], lengths[start:stop], start, pool)
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


def _single_group(rows: np.ndarray, lengths: np.ndarray, start: int, pool: SlotPool) -> QueryGroup:
    longest = int(lengths[-1])
    visible = None
    if int(lengths[0]) != longest:
        visible = (np.arange(longest) < lengths[:, None])[:, None]
    keys = pool.table[rows, :longest].astype(np.int64)
    return QueryGroup(start=start, count=len(rows), keys=keys, visible=visible)


def _buckets(feeds: Sequence[Feed]) -> Iterable[list[Feed]]:
    """Group feeds whose lengths share a power of two, in a fixed order."""
    buckets: dict[int, list[Feed]] = {}
    for feed in feeds:
        buckets.setdefault((len(feed.token_ids) - 1).bit_length(), []).append(feed)
    return [buckets[size] for size in sorted(buckets)]


def _feed_group(feeds: Sequence[Feed], start: int) -> QueryGroup:
    counts = np.array([len(feed.token_ids) for feed in feeds])
    num_queries, longest = int(counts.max()), max(len(feed.readable) for feed in feeds)
    keys = np.zeros((len(feeds), longest), dtype=np.int64)
    visible = np.zeros((len(feeds), num_queries, longest), dtype=np.bool_)
    for index, feed in enumerate(feeds):
        count, length = len(feed.token_ids), len(feed.readable)
        keys[index, :length] = feed.readable
        visible[index, :count, :length] = feed.mask()
        visible[index, count:, 0] = True  # no softmax over nothing
    padded = kept = None
    if counts.min() != num_queries:
        offsets = np.arange(num_queries)
        firsts = np.concatenate([[0], counts.cumsum()[:-1]])
        padded = (firsts[:, None] + np.minimum(offsets, counts[:, None] - 1)).reshape(-1)
        kept = np.flatnonzero(offsets < counts[:, None])
    return QueryGroup(
        start=start,
        count=int(counts.sum()),
        keys=keys,
        visible=visible,
        padded=padded,
        kept=kept,
    )
