"""Samples of any length into microbatches of one rectangular shape.

Invariants: every token of every sample lands in exactly one cell, a sample is never split, equal
input gives equal output, all microbatches of one call share a shape. Does not reorder tokens and
does not normalise the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from npr_megatron.config.alignment import ROW_MULTIPLE
from npr_megatron.errors import InputError
from npr_megatron.records.sample import PackedBatch, TrainingSample
from npr_megatron.records.trajectory import RouteArray
from npr_megatron.topology.pairs import num_visible_pairs

Index = npt.NDArray[np.int64]


def pack(
    samples: Sequence[TrainingSample],
    row_tokens: int,
    rows_per_microbatch: int,
    num_replicas: int,
    row_multiple: int = ROW_MULTIPLE,
) -> tuple[PackedBatch, ...]:
    """Pack samples first-fit decreasing into rows, and the rows into microbatches.

    Args:
        row_tokens: no row holds more tokens.
        rows_per_microbatch: no microbatch has more rows.
        num_replicas: the number of microbatches is a multiple of it.
        row_multiple: the length of all rows is a multiple of it, see
            ``config.alignment.row_multiple``.

    Returns:
        Microbatches of one shape, see :func:`pack_rows`.

    Raises:
        InputError: there are no samples, or some are longer than ``row_tokens`` (their lengths are
            listed).
    """
    lengths = np.array([len(sample.token_ids) for sample in samples], dtype=np.int64)
    _check(lengths, row_tokens)
    row, offset = first_fit_decreasing(lengths, row_tokens)
    rows: list[list[TrainingSample]] = [[] for _ in range(int(row.max()) + 1)]
    for index in np.lexsort((offset, row)):
        rows[row[index]].append(samples[index])
    return pack_rows(rows, rows_per_microbatch, num_replicas, row_multiple)


def pack_rows(
    rows: Sequence[Sequence[TrainingSample]],
    rows_per_microbatch: int,
    num_replicas: int,
    row_multiple: int = ROW_MULTIPLE,
) -> tuple[PackedBatch, ...]:
    """Deal rows, each a few samples side by side, to microbatches and replicas.

    Attention costs the more the longer the samples of a row are, so rows are dealt by it:
    replicas, which wait for one another at the end of a step, get about equal sums of it, and so do
    the microbatches of a replica (see :func:`deal`).

    Returns:
        Microbatches of one shape [B, S]; replica r takes the r-th of every ``num_replicas``. S is
        the longest row rounded up to ``row_multiple``; B is the smallest that keeps the number of
        microbatches at its minimum. What nothing fills is padding: it sees itself only, nobody
        sees it, and it has neither label nor weight.
    """
    samples = [sample for row in rows for sample in row]
    lengths = np.array([len(sample.token_ids) for sample in samples], dtype=np.int64)
    segments = np.concatenate([np.arange(len(row)) for row in rows])
    offsets = np.concatenate([_starts([len(sample.token_ids) for sample in row]) for row in rows])
    num_microbatches = _round_up(-(-len(rows) // rows_per_microbatch), num_replicas)
    rows_each = -(-len(rows) // num_microbatches)
    row_length = _round_up(int((offsets + lengths).max()), row_multiple)
    costs = np.array(
        [sum(num_visible_pairs(sample.block, sample.branch) for sample in row) for row in rows]
    )
    dealt_row = np.repeat(
        deal(costs, num_microbatches, rows_each, num_replicas), [len(row) for row in rows]
    )
    shape = (num_microbatches, rows_each, row_length)
    return _fill(samples, lengths, dealt_row * row_length + offsets, segments, shape)


def first_fit_decreasing(lengths: Index, row_tokens: int) -> tuple[Index, Index]:
    """Return the row of each sample and its offset inside the row, longest samples placed first.

    Ties keep the order given. Needs ``max(lengths) <= row_tokens``.
    """
    row = np.zeros(len(lengths), dtype=np.int64)
    offset = np.zeros(len(lengths), dtype=np.int64)
    used = np.zeros(len(lengths) + 1, dtype=np.int64)
    num_open = 0
    for sample in np.argsort(-lengths, kind="stable"):
        chosen = np.argmax(used[: num_open + 1] + lengths[sample] <= row_tokens)
        num_open += int(chosen == num_open)
        row[sample], offset[sample] = chosen, used[chosen]
        used[chosen] += lengths[sample]
    return row, offset


def deal(costs: Index, num_microbatches: int, rows_each: int, num_replicas: int) -> Index:
    """Return the place of each row, ``microbatch * rows_each + slot``; no place is taken twice.

    The costliest row left goes to the replica that has least so far and room, there to the
    microbatch that has least and room.

    Args:
        costs: [rows] attention work of each; at most ``num_microbatches * rows_each`` rows.
        num_microbatches: multiple of ``num_replicas``; microbatch m is of replica
            ``m % num_replicas``.
    """
    load = np.zeros(num_microbatches, dtype=np.int64)
    filled = np.zeros(num_microbatches, dtype=np.int64)
    replica_of = np.arange(num_microbatches) % num_replicas
    place = np.zeros(len(costs), dtype=np.int64)
    for row in np.argsort(-costs, kind="stable"):
        replica_load = np.bincount(replica_of, weights=load)
        has_room = filled < rows_each
        order = np.lexsort((load, replica_load[replica_of], ~has_room))
        chosen = order[0]
        place[row] = chosen * rows_each + filled[chosen]
        filled[chosen] += 1
        load[chosen] += costs[row]
    return place


def _starts(lengths: Sequence[int]) -> Index:
    return np.cumsum([0, *lengths[:-1]], dtype=np.int64)


def _fill(
    samples: Sequence[TrainingSample],
    lengths: Index,
    starts: Index,
    segments: Index,
    shape: tuple[int, int, int],
) -> tuple[PackedBatch, ...]:
    """Scatter all streams at once; ``starts`` index the flattened [M, B, S] cells."""
    start_T = np.repeat(starts, lengths)
    within_T = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    cell_T = start_T + within_T

    token_T = np.concatenate([sample.token_ids for sample in samples])
    predecessor_T = np.concatenate([sample.predecessor for sample in samples])
    learnt_T = np.concatenate([sample.loss_mask for sample in samples])
    logprob_T = np.concatenate([_logprobs(sample) for sample in samples])
    advantage_T = np.repeat([sample.advantage for sample in samples], lengths)
    assert (predecessor_T[learnt_T] >= 0).all(), "a learnt token has no predecessor"
    label_cell = (start_T + predecessor_T)[learnt_T]

    def scattered(
        cells: Index, values: npt.NDArray[Any], empty: int, dtype: type
    ) -> npt.NDArray[Any]:
        stream = np.full(int(np.prod(shape)), empty, dtype=dtype)
        stream[cells] = values
        return stream.reshape(shape)

    streams = {
        "token_ids": scattered(cell_T, token_T, 0, np.int32),
        "position_ids": scattered(
            cell_T, np.concatenate([s.position_ids for s in samples]), 0, np.int32
        ),
        "segment": scattered(cell_T, np.repeat(segments, lengths), -1, np.int32),
        "block": scattered(cell_T, np.concatenate([s.block for s in samples]), 0, np.int32),
        "branch": scattered(cell_T, np.concatenate([s.branch for s in samples]), 0, np.int32),
        "labels": scattered(label_cell, token_T[learnt_T], -1, np.int32),
        "advantages": scattered(label_cell, advantage_T[learnt_T], 0, np.float32),
        "rollout_logprobs": scattered(label_cell, logprob_T[learnt_T], 0, np.float32),
    }
    routes_T = _routes(samples, lengths)
    if routes_T is not None:
        routes = np.full((int(np.prod(shape)), *routes_T.shape[1:]), -1, dtype=np.int16)
        routes[cell_T] = routes_T
        streams["routed_experts"] = routes.reshape(*shape, *routes_T.shape[1:])
    return tuple(
        PackedBatch(**{name: stream[i] for name, stream in streams.items()})
        for i in range(shape[0])
    )


def _routes(samples: Sequence[TrainingSample], lengths: Index) -> RouteArray | None:
    """Return the recorded experts of all samples end to end, [T, M, K]; None where none has any."""
    recorded = [sample.routed_experts for sample in samples]
    shapes = {routes.shape[1:] for routes in recorded if routes is not None}
    if not shapes:
        return None
    assert len(shapes) == 1, "all samples come from one model"
    free = [np.full((length, *next(iter(shapes))), -1, dtype=np.int16) for length in lengths]
    return np.concatenate(
        [own if own is not None else none for own, none in zip(recorded, free, strict=True)]
    )


def _logprobs(sample: TrainingSample) -> npt.NDArray[Any]:
    if sample.rollout_logprobs is None:
        return np.zeros(len(sample.token_ids), dtype=np.float32)
    return sample.rollout_logprobs


def _check(lengths: Index, row_tokens: int) -> None:
    if len(lengths) == 0:
        raise InputError(
            "samples were to be packed; there are none; skip the optimizer step in which "
            "nothing was kept"
        )
    if lengths.max() > row_tokens:
        too_long = lengths[lengths > row_tokens]
        raise InputError(
            f"every sample must fit a row of {row_tokens} tokens; found {len(too_long)} longer, of "
            f"{', '.join(map(str, too_long[:10]))} tokens; raise trainer.row_tokens or lower "
            "sampling.max_new_tokens"
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
