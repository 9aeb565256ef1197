"""What changed since the weights a destination holds: overwrite records in plan coordinates.

A source compares its own shard with the bytes it served before, copy by copy of the plan, so a
delta needs no gather and lands where the plan says. Each copy falls into chunks of at most 65,536
elements; of a chunk that changed a record says which elements have which new bits, in the shortest
of three forms::

    positions   2 bytes per changed element + its value     below 1/16 changed
    bitmap      1/8 byte per element + the changed values   up to almost all
    dense       every value                                 and wherever there is no base

Comparison is of bits: NaN payloads and signs of zeros are values. Records overwrite (they never
combine with what is there), so applying them twice does no harm. Works on host tensors of any
dtype. Which delta may be applied to what is decided elsewhere (``weights.delta_chain``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npr_megatron.errors import StaleWeightsError
from npr_megatron.weights.box import Index
from npr_megatron.weights.plans.copies import Copy

Storages = Mapping[int, Mapping[str, Tensor]]
"""By layout rank and name."""
Bytes = npt.NDArray[np.uint8]
_Bits = npt.NDArray[np.unsignedinteger]

CHUNK_ELEMENTS = 2**16
"""So that a position takes two bytes."""
_POSITIONS, _BITMAP, _DENSE = range(3)
_RECORD = np.dtype([("chunk", "<u4"), ("form", "<u4"), ("count", "<u4")])
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@torch.no_grad()
def encode_delta(copies: Iterable[Copy], new: Storages, base: Storages | None) -> Bytes:
    """Return the records that turn ``base`` into ``new`` for those who receive ``copies``.

    Args:
        new, base: storages of the source ranks that ``copies`` read, equal in names, shapes and
            dtypes; without a base every chunk is dense.
    """
    records: list[tuple[int, int, int]] = []
    payload: list[Bytes] = []
    for number, (copy, part) in enumerate(_chunks(copies)):
        values = _source_chunk(copy, part, new)
        before = None if base is None else _source_chunk(copy, part, base)
        form, count, content = _encode_chunk(values, before)
        if count:
            records.append((number, form, count))
            payload += content
    table = np.array(records, _RECORD)
    return np.concatenate([np.array([len(records)], "<u8").view(np.uint8), _raw(table), *payload])


@torch.no_grad()
def apply_delta(body: Bytes, copies: Iterable[Copy], targets: Storages) -> None:
    """Overwrite what ``encode_delta`` found changed, in place in the target ranks' storages.

    Raises:
        StaleWeightsError: ``body`` is damaged. Unless the message says so, nothing was written.
    """
    table, payload = _records(body)
    chunks = list(_chunks(copies))
    if len(table) and int(table["chunk"].max()) >= len(chunks):
        raise StaleWeightsError(f"a delta changes chunk {table['chunk'].max()} of {len(chunks)}")
    places: list[tuple[_Bits, int, int]] = []
    for number, form, count in table.tolist():
        copy, part = chunks[number]
        places.append((_target_chunk(copy, part, targets), form, count))
    sizes = [_content_bytes(form, count, place) for place, form, count in places]
    is_whole = all(count == place.size for place, form, count in places if form == _DENSE)
    if sum(sizes) != len(payload) or not is_whole:
        raise StaleWeightsError(f"a delta has {len(payload)} bytes of content, not {sum(sizes)}")
    offset = 0
    for (place, form, count), size in zip(places, sizes, strict=True):
        _apply_chunk(place, form, count, payload[offset : offset + size])
        offset += size


def _encode_chunk(values: _Bits, before: _Bits | None) -> tuple[int, int, list[Bytes]]:
    """Return the shortest form, the number of values in it, and its content."""
    if before is None:
        return _DENSE, values.size, [_raw(values)]
    changed = values != before
    count = int(np.count_nonzero(changed))
    counts = {_POSITIONS: count, _BITMAP: count, _DENSE: values.size}
    form = min(counts, key=lambda form: _content_bytes(form, counts[form], values))
    if form == _DENSE:
        return form, values.size, [_raw(values)]
    # Taking by position is ten times faster than by mask where a fifth has changed.
    positions = np.flatnonzero(changed)
    index = np.packbits(changed) if form == _BITMAP else _raw(positions.astype("<u2"))
    return form, count, [index, values.reshape(-1)[positions].view(np.uint8)]


def _apply_chunk(place: _Bits, form: int, count: int, content: Bytes) -> None:
    if form == _DENSE:
        place[...] = content.view(place.dtype).reshape(place.shape)
        return
    split = 2 * count if form == _POSITIONS else -(-place.size // 8)
    index, values = content[:split], content[split:].view(place.dtype)
    if form == _POSITIONS:
        positions = index.view("<u2").astype(np.intp)
    else:
        positions = np.flatnonzero(np.unpackbits(index, count=place.size).view(bool))
    if len(positions) != count or int(positions.max()) >= place.size:
        raise StaleWeightsError("a delta is damaged and half applied; push the full weights")
    if place.flags.c_contiguous:
        place.reshape(-1)[positions] = values
    else:
        place[np.unravel_index(positions, place.shape)] = values


def _content_bytes(form: int, count: int, chunk: _Bits) -> int:
    """Return the bytes that ``count`` values of ``chunk`` take in ``form``."""
    index = {_POSITIONS: 2 * count, _BITMAP: -(-chunk.size // 8), _DENSE: 0}[form]
    return index + count * chunk.itemsize


def _records(body: Bytes) -> tuple[npt.NDArray[np.void], Bytes]:
    """Return the table of records and the content that follows it."""
    num_records = int(body[:8].view("<u8")[0]) if len(body) >= 8 else -1
    end = 8 + num_records * _RECORD.itemsize
    if num_records < 0 or end > len(body):
        raise StaleWeightsError(f"a delta of {len(body)} bytes is cut off")
    table = body[8:end].view(_RECORD)
    if len(table) and (int(table["form"].max()) > _DENSE or int(table["count"].min()) == 0):
        raise StaleWeightsError("a delta has records of an unknown form or of nothing")
    return table, body[end:]


def _chunks(copies: Iterable[Copy]) -> Iterator[tuple[Copy, tuple[slice, ...]]]:
    """Yield parts of copies, relative to them: so many whole rows, or so much of one row."""
    for copy in copies:
        height = copy.shape[0] if len(copy.shape) == 2 else 1
        width = copy.shape[-1]
        columns = min(width, CHUNK_ELEMENTS)
        rows = CHUNK_ELEMENTS // columns
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                down = slice(top, min(top + rows, height))
                across = slice(left, min(left + columns, width))
                yield copy, (down, across)[-len(copy.shape) :]


def _source_chunk(copy: Copy, part: Sequence[slice], storages: Storages) -> _Bits:
    storage = storages[copy.source_rank][copy.source_storage]
    return _region(storage, copy.source_start, part)


def _target_chunk(copy: Copy, part: Sequence[slice], storages: Storages) -> _Bits:
    storage = storages[copy.target_rank][copy.target_storage]
    return _region(storage, copy.target_start, part)


def _region(storage: Tensor, start: Index, part: Sequence[slice]) -> _Bits:
    """Return the bits of a part of a box, as a view."""
    leading = len(start) - len(part)
    here = tuple(
        slice(first + along.start, first + along.stop)
        for first, along in zip(start[leading:], part, strict=True)
    )
    return _bits(storage)[start[:leading] + here]


def _bits(storage: Tensor) -> _Bits:
    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    size = storage.element_size()
    return storage.detach().view(signed[size]).numpy().view(_UNSIGNED[size])


def _raw(array: npt.NDArray[np.generic]) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
