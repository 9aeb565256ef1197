"""Lays streams and feeds out as one flat batch for the model. numpy only; a batch can be pickled.

Streams that feed a single token come first, families that share a beginning together; feeds follow
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
from npr_megatron.engine.memory.pool import SlotArray, SlotPool
from npr_megatron.engine.schedule.families import IndexArray, find_families
from npr_megatron.engine.schedule.feed import Feed
from npr_megatron.records.trajectory import BoolArray

_MIN_SAVED_READS = 1536
"""Slots that feeds must read less for a group of their own to pay for its kernels."""
_LENGTH_RATIO = 0.75
"""Feeds that read less than this share of the longest may be a group of their own."""


@dataclass(frozen=True, slots=True, eq=False)
class QueryGroup:
    """B rows of S queries each (ragged rows padded), reading L slots each.

    The group's tokens are ``start .. start + count`` of the flat batch, row after row.
    """

    start: int
    count: int
    keys: IndexArray
    """[B, L] slots, padded with slot 0."""
    lengths: IndexArray | None = None
    """[B] where S is 1: each query sees the first so many of its slots."""
    visible: BoolArray | None = None
    """[B, S, L] elsewhere."""
    padded: IndexArray | None = None
    """[B * S] offset of each padded query inside the group; None where no row is padded."""
    kept: IndexArray | None = None
    """[count] index into B * S of the queries that are real; None where no row is padded."""
    num_shared: int = 0
    """The first so many columns of ``keys`` are the same in all rows, and seen by all: read them
    once.
    """


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
    streams: Sequence[Stream], feeds: Sequence[Feed], pool: SlotPool
) -> tuple[Batch, list[Stream], list[tuple[Segment, int]]]:
    """Return the batch that feeds the last token of each stream, and all of ``feeds``.

    Appends one slot to the row of every stream; feeds bring theirs.

    Returns:
        The batch, the streams that take a sample from its first logits, and the known tokens that
        the other logits predict.
    """
    groups, own_slots, order = _place_streams(streams, pool)
    last = [stream.segment.token_ids[-1] for stream in streams]
    places = [stream.segment.position_ids[-1] for stream in streams]
    token_ids = [np.array(last, np.int64)[order]]
    position_ids = [np.array(places, np.int64)[order]]
    slots = [own_slots]
    # Families lie together in the batch, results are wanted in the order given.
    index = np.empty_like(order)
    index[order] = np.arange(len(order))
    sampled, logit_index = list(streams), [index]
    placed: list[Feed] = []
    start = len(streams)
    for bucket in _buckets(feeds):
        groups.append(_feed_group(bucket, start))
        start += groups[-1].count
        placed += bucket
    token_ids += [np.asarray(feed.token_ids, np.int64) for feed in placed]
    position_ids += [np.asarray(feed.position_ids, np.int64) for feed in placed]
    slots += [feed.slots for feed in placed]
    scored: list[tuple[Segment, int]] = []
    if feeds:
        opened, scored, feed_index = _feed_logits(feeds, placed, len(streams))
        sampled += opened
        logit_index.append(feed_index)
    batch = Batch(
        token_ids=_joined(token_ids),
        position_ids=_joined(position_ids),
        slots=_joined(slots),
        groups=groups,
        logit_index=_joined(logit_index),
    )
    return batch, sampled, scored


def _feed_logits(
    feeds: Sequence[Feed], placed: Sequence[Feed], start: int
) -> tuple[list[Stream], list[tuple[Segment, int]], IndexArray]:
    """Return the streams that take a sample, the tokens that are known, and the tokens of the batch
    that predict the former, then the latter.

    Args:
        feeds: in the order given: buckets mix the branches of a fork, whose samples are taken in
            the order of the branches.
        placed: the same as they lie in the batch, from ``start`` on.
    """
    scored: list[tuple[Segment, int]] = []
    scored_index: list[int] = []
    last_index: dict[Stream, int] = {}
    for feed in placed:
        scored += feed.scored
        scored_index += range(start, start + len(feed.scored))
        start += len(feed.token_ids)
        if feed.sampled is not None:
            last_index[feed.sampled] = start - 1
    opened = [feed.sampled for feed in feeds if feed.sampled is not None]
    index = [*(last_index[stream] for stream in opened), *scored_index]
    return opened, scored, np.array(index, np.int64)


def _joined(parts: Sequence[npt.NDArray[np.integer]]) -> IndexArray:
    return np.concatenate(parts, dtype=np.int64) if len(parts) > 1 else parts[0].astype(np.int64)


def _place_streams(
    streams: Sequence[Stream], pool: SlotPool
) -> tuple[list[QueryGroup], SlotArray, IndexArray]:
    """Append one slot per stream; return a group per family, the slots, the order of the rows."""
    if not streams:
        return [], np.zeros(0, np.int32), np.zeros(0, np.int64)
    rows = np.array([stream.row for stream in streams], dtype=np.int64)
    labels, num_shared = find_families(rows, pool)
    order, sizes = np.arange(len(rows)), [len(rows)]
    if len(num_shared) > 1:
        order = labels.argsort(kind="stable")
        rows = rows[order]
        sizes = np.bincount(labels, minlength=len(num_shared)).tolist()
    slots = pool.append_one_each(rows)
    groups: list[QueryGroup] = []
    start = 0
    for size, shared in zip(sizes, num_shared, strict=True):
        if size:
            groups.append(_single_group(rows[start : start + size], start, shared, pool))
        start += size
    return groups, slots, order


def _length_ranges(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Cut ascending ``lengths`` where reading the shorter feeds apart pays."""
    ranges: list[tuple[int, int]] = []
    stop = len(lengths)
    while stop:
        longest = int(lengths[stop - 1])
        start = int(np.searchsorted(lengths[:stop], longest * _LENGTH_RATIO))
        if start and start * (longest - int(lengths[start - 1])) < _MIN_SAVED_READS:
            start = 0
        ranges.append((start, stop))
        stop = start
    return ranges[::-1]


def _single_group(rows: IndexArray, start: int, num_shared: int, pool: SlotPool) -> QueryGroup:
    return QueryGroup(
        start=start,
        count=len(rows),
        keys=pool.read_each(rows),
        lengths=pool.length[rows],
        num_shared=num_shared if len(rows) > 1 else 0,
    )


def _buckets(feeds: Sequence[Feed]) -> Iterable[list[Feed]]:
    """Group feeds whose lengths share a power of two and that read similarly much."""
    buckets: dict[int, list[Feed]] = {}
    for feed in feeds:
        buckets.setdefault((len(feed.token_ids) - 1).bit_length(), []).append(feed)
    for size in sorted(buckets):
        bucket = sorted(buckets[size], key=lambda feed: len(feed.readable))
        lengths = np.array([len(feed.readable) for feed in bucket])
        for start, stop in _length_ranges(lengths):
            yield bucket[start:stop]


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
