"""Batches as rows of one query each, and the fixed shapes these are padded to. numpy only.

Forks and joins feed a few dictated tokens in the middle of decoding, so with many trees under way
hardly a step is pure. But every layer writes all keys and values before it reads any, so a short
run of tokens is as well computed as rows of one token each, every one reading what it sees. That
makes a step of single tokens and short runs one kind of step, the kind that is worth a graph.

A captured graph replays the same kernels on the same addresses, so its shapes must not depend on
the data. A decode step is therefore padded to a *bucket*: so many rows, each reading so many slots.
Few buckets mean few captures, close ones little padding: row counts and lengths are rounded up by
at most a quarter once they are large.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from npr_megatron.engine.schedule.batch import Batch, IndexArray, QueryGroup
from npr_megatron.records.trajectory import BoolArray

_LONGEST_RUN = 16
"""Tokens of a feed that become rows; each reads the keys of the whole row, so a prompt does not."""
_ROW_STEP = 8
_KEY_STEP = 128


@dataclass(frozen=True, slots=True, eq=False)
class DecodeRows:
    """S rows of one query each, reading ragged lists of slots."""

    token_ids: IndexArray
    """[S]"""
    position_ids: IndexArray
    """[S]"""
    slots: IndexArray
    """[S] where each row's new keys and values go."""
    logit_index: IndexArray
    """[M] rows whose logits matter."""
    lengths: IndexArray
    """[S] slots each row reads, its own new one included."""
    blocks: list[IndexArray]
    """Consecutive rows together: [B, L] slots, the first ``lengths`` of a row, then slot 0."""
    num_shared: list[int]
    """Per block, how many of the first slots are the same in all its rows."""

    @property
    def longest(self) -> int:
        """Slots read by the row that reads most."""
        return int(self.lengths.max())

    def write_table(self, table: npt.NDArray[np.int32]) -> None:
        """Fill ``table`` [at least S, at least ``longest``] with slots, and with 0 beside them."""
        table[:] = 0
        start = 0
        for block in self.blocks:
            stop = start + len(block)
            longest = int(self.lengths[start:stop].max())
            table[start:stop, :longest] = block[:, :longest]
            start = stop

    def flat_slots(self) -> npt.NDArray[np.int32]:
        """Return [sum of ``lengths``] slots, row after row."""
        parts = [
            block[np.arange(block.shape[1]) < lengths[:, None]]
            for block, lengths in zip(self.blocks, self.block_lengths, strict=True)
        ]
        return np.concatenate(parts).astype(np.int32)

    @property
    def block_lengths(self) -> list[IndexArray]:
        """``lengths``, cut as ``blocks`` are."""
        return np.split(self.lengths, np.cumsum([len(block) for block in self.blocks])[:-1])


def decode_rows(batch: Batch) -> DecodeRows | None:
    """Return ``batch`` as rows of one query each; None if a feed is long, or nothing is fed."""
    if not batch.groups or any(run_of(group) > _LONGEST_RUN for group in batch.groups):
        return None
    lengths, blocks = zip(*(block_of(group) for group in batch.groups), strict=True)
    return DecodeRows(
        token_ids=batch.token_ids,
        position_ids=batch.position_ids,
        slots=batch.slots,
        logit_index=batch.logit_index,
        lengths=np.concatenate(lengths),
        blocks=list(blocks),
        num_shared=[group.num_shared for group in batch.groups],
    )


def run_of(group: QueryGroup) -> int:
    """Return the queries per row, padding included."""
    num_queries = group.count if group.padded is None else len(group.padded)
    return num_queries // len(group.keys)


def block_of(group: QueryGroup) -> tuple[IndexArray, IndexArray]:
    """Return how many slots each of the [count] queries of a group reads, and these [count, L]."""
    if group.lengths is not None:
        return group.lengths, group.keys
    assert group.visible is not None
    run = run_of(group)
    index = np.arange(group.count) if group.kept is None else group.kept
    keys = group.keys[index // run]
    seen: BoolArray = group.visible[index // run, index % run]
    lengths = seen.sum(axis=1)
    if (seen[:, 1:] & ~seen[:, :-1]).any():
        # A mask with holes, of a tree replayed: bring what is seen to the front.
        order = np.argsort(~seen, axis=1, kind="stable")
        keys = np.take_along_axis(keys, order, axis=1)
    return lengths, keys * (np.arange(keys.shape[1]) < lengths[:, None])


class Bucket(NamedTuple):
    """A shape of the decode step."""

    num_rows: int
    num_keys: int
    """Slots read per row."""


class BucketLimits(NamedTuple):
    """The largest shapes worth keeping memory for."""

    max_rows: int
    max_reads: int
    """Of rows times keys: the slots gathered at once in a layer."""


def bucket_for(num_rows: int, longest: int, limits: BucketLimits) -> Bucket | None:
    """Return the smallest bucket that holds the rows, None if it is beyond ``limits``."""
    bucket = Bucket(round_up_rows(num_rows), round_up_keys(longest))
    is_wide = bucket.num_rows > round_up_rows(limits.max_rows)
    if is_wide or bucket.num_rows * bucket.num_keys > limits.max_reads:
        return None
    return bucket


def round_up_rows(num_rows: int) -> int:
    """Return 1, 2, 4, 8, 16, 24, 32, 40 .. 64, 80 .. 128, 160 ..: four per doubling."""
    if num_rows <= _ROW_STEP:
        return 1 << (num_rows - 1).bit_length()
    return _round_up(num_rows, _ROW_STEP)


def round_up_keys(num_keys: int) -> int:
    """Return 128, 256 .. 1024, 1280 .. 2048, 2560 ..: four per doubling."""
    return _round_up(num_keys, _KEY_STEP)


def _round_up(value: int, least_step: int) -> int:
    step = max(least_step, 1 << max(0, (value - 1).bit_length() - 3))
    return -(-value // step) * step
