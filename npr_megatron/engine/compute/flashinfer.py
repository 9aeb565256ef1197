"""Attention through FlashInfer, which reads the slots of each row where they lie.

Against gathering this saves two of three passes over keys and values and all padding. The cache
needs no other layout: [slots + 1, 2 K, D] with keys in front of values is FlashInfer's combined
paged cache in its NHD form, [pages, 2, page size, K, D], for pages of one slot; the library takes
keys and values apart as strided views and only asks that both have the same strides.

Three uses: decode steps inside graphs, everything else as a causal or masked prefill, and two
levels where many rows share a long beginning. The kernels are of the FA2 family throughout: it is
the one that takes custom masks, and rounds alike in all three.

The library is optional (extra ``gpu``), needs bf16 and a head size it was built for, and is
imported nowhere else. Checked against the source of FlashInfer 0.6.18; compiles on first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npr_megatron.engine.compute.attention import split_heads
from npr_megatron.engine.compute.decode_rows import (
    Bucket,
    BucketLimits,
    DecodeRows,
    decode_rows,
    round_up_rows,
)
from npr_megatron.engine.compute.device_batch import Placed
from npr_megatron.engine.compute.model import Attend, EngineModel
from npr_megatron.engine.compute.paged_plan import (
    Cascade,
    PagedRows,
    cascade_of,
    indptr,
    paged_rows,
)
from npr_megatron.engine.compute.transfer import Upload
from npr_megatron.engine.schedule.batch import Batch

_HEAD_SIZES = (64, 128, 256)
_WORKSPACE_BYTES = 256 << 20
"""Partial results of rows that several blocks of threads share. FlashInfer suggests 128 MB."""
_TENSOR_CORE_GROUP = 4
"""Queries per key head from which tensor cores beat plain ones in decoding."""
_CASCADE_BYTES = 32 << 30
"""Reads that two levels must save over all layers to be worth a pass outside of a graph: some 10 ms
of launches at some 4 TB/s. An estimate, not a measurement."""


def library_for(model: EngineModel) -> Any | None:
    """Return FlashInfer if it is installed and can serve ``model``, else None."""
    cache = model.kv_cache[0]
    if not cache.is_cuda or cache.dtype != torch.bfloat16 or cache.shape[-1] not in _HEAD_SIZES:
        return None
    try:
        return importlib.import_module("flashinfer")
    except ImportError:
        return None


class _Heads(NamedTuple):
    """What every plan says about the model."""

    num_q: int
    num_kv: int
    size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model: EngineModel) -> _Heads:
        cache = model.kv_cache[0]
        return cls(model.num_q, model.num_kv, cache.shape[-1], cache.dtype)


def attend_whole(kv_cache: Sequence[Tensor], slots: Tensor, wrapper: Any) -> Attend:
    """Return attention that writes the batch to ``slots`` [T] and reads as ``wrapper`` planned."""

    def attend(layer: int, heads: Tensor) -> Tensor:
        cache = kv_cache[layer]
        queries, keys_values = split_heads(heads, cache.shape[1])
        cache.index_copy_(0, slots, keys_values)
        return wrapper.run(queries, as_pages(cache)).flatten(1)

    return attend


def attend_in_parts(
    kv_cache: Sequence[Tensor], slots: Tensor, parts: Sequence[tuple[Any, Tensor]]
) -> Attend:
    """Return attention that writes the batch to ``slots`` [T]; each planned wrapper serves the
    queries of the tokens beside it.
    """

    def attend(layer: int, heads: Tensor) -> Tensor:
        cache = kv_cache[layer]
        queries, keys_values = split_heads(heads, cache.shape[1])
        cache.index_copy_(0, slots, keys_values)
        out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
        for wrapper, tokens in parts:
            read = wrapper.run(queries.index_select(0, tokens), as_pages(cache))
            out.index_copy_(0, tokens, read)
        return out.flatten(1)

    return attend


def as_pages(cache: Tensor) -> Tensor:
    """Return [slots, 2 K, D] as FlashInfer's [pages, 2, 1, K, D]: a view."""
    num_slots, doubled, size = cache.shape
    return cache.view(num_slots, 2, 1, doubled // 2, size)


class FlashInferReader:
    """A ``KeyReader`` over FlashInfer's decode kernels: buckets differ in rows only.

    Planning happens on the host before each replay and rewrites the wrapper's device arrays in
    place; the slots to read are in the static buffer already, which the wrapper owns as its own, so
    planning copies them onto themselves, which torch skips.
    """

    def __init__(self, library: Any, model: EngineModel, limits: BucketLimits) -> None:
        self.limits = limits
        self._library = library
        self._kv_cache = model.kv_cache
        self._heads = _Heads.of(model)
        self._workspace = _workspace(model.device)
        self._wrappers: dict[int, Any] = {}

    def bucket(self, rows: DecodeRows) -> Bucket | None:
        """Return the bucket of as many rows; None beyond the limits, or where two levels pay."""
        num_rows = round_up_rows(len(rows.token_ids))
        num_reads = int(rows.lengths.sum()) + num_rows - len(rows.token_ids)
        if num_rows > round_up_rows(self.limits.max_rows) or num_reads > self.limits.max_reads:
            return None
        return None if worthwhile_cascade(rows, self._kv_cache) else Bucket(num_rows, 0)

    def fill(self, rows: DecodeRows, bucket: Bucket, reads: npt.NDArray[np.int32]) -> int:
        """Write the slots of all rows one after another, then slot 0 per row of padding."""
        slots = rows.flat_slots()
        used = len(slots) + bucket.num_rows - len(rows.token_ids)
        reads[: len(slots)] = slots
        reads[len(slots) : used] = 0
        return used

    def plan(self, rows: DecodeRows, bucket: Bucket, reads: Tensor, used: int) -> None:
        """Share the rows out among blocks of threads."""
        heads, num_rows = self._heads, bucket.num_rows
        if num_rows not in self._wrappers:
            self._wrappers[num_rows] = self._wrapper(num_rows, reads)
        lengths = np.ones(num_rows, np.int64)
        lengths[: len(rows.lengths)] = rows.lengths
        self._wrappers[num_rows].plan(
            torch.from_numpy(indptr(lengths)),
            reads[:used],
            torch.ones(num_rows, dtype=torch.int32),
            heads.num_q,
            heads.num_kv,
            heads.size,
            1,
            q_data_type=heads.dtype,
            kv_data_type=heads.dtype,
        )

    def attention(self, bucket: Bucket, slots: Tensor, lengths: Tensor, reads: Tensor) -> Attend:
        """Return the attention as planned last."""
        return attend_whole(self._kv_cache, slots, self._wrappers[bucket.num_rows])

    def _wrapper(self, num_rows: int, reads: Tensor) -> Any:
        def zeros(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int32, device=reads.device)

        return self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=self._heads.num_q // self._heads.num_kv >= _TENSOR_CORE_GROUP,
            paged_kv_indptr_buffer=zeros(num_rows + 1),
            paged_kv_indices_buffer=reads,
            paged_kv_last_page_len_buffer=zeros(num_rows),
        )


class FlashInferBatches:
    """Any batch, outside of graphs: one causal and one masked prefill, or two levels."""

    def __init__(self, library: Any, model: EngineModel) -> None:
        self._kv_cache = model.kv_cache
        self._heads = _Heads.of(model)
        workspace = _workspace(model.device)
        prefill = library.BatchPrefillWithPagedKVCacheWrapper
        self._causal = prefill(workspace, "NHD", backend="fa2")
        self._masked = prefill(workspace, "NHD", backend="fa2")
        self._levels = library.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")

    def place(self, batch: Batch, upload: Upload) -> Placed:
        """Send ``batch`` to the device in one copy and plan its attention."""
        rows = decode_rows(batch)
        cascade = None if rows is None else worthwhile_cascade(rows, self._kv_cache)
        kinds = [cascade.shared, cascade.own] if cascade else list(paged_rows(batch))
        found = [kind for kind in kinds if kind is not None]
        arrays = [batch.token_ids, batch.position_ids, batch.slots, batch.logit_index]
        arrays += [array for kind in found for array in (kind.tokens, kind.key_slots)]
        arrays += [kind.mask for kind in found if kind.mask is not None]
        token_ids, position_ids, slots, logit_index, *rest = upload(arrays)
        if cascade:
            self._plan_levels(cascade, rest[1], rest[3])
            parts = [(self._levels, rest[0])]
        else:
            parts = [
                (self._plan(kind, key_slots, rest[-1]), tokens)
                for kind, tokens, key_slots in zip(found, rest[::2], rest[1::2], strict=False)
            ]
        attend = attend_in_parts(self._kv_cache, slots, parts)
        return Placed(token_ids, position_ids, slots, logit_index, attend)

    def _plan(self, rows: PagedRows, key_slots: Tensor, mask: Tensor) -> Any:
        is_causal = rows.mask is None
        wrapper = self._causal if is_causal else self._masked
        heads = self._heads
        wrapper.plan(
            torch.from_numpy(rows.query_indptr),
            torch.from_numpy(rows.key_indptr),
            key_slots,
            torch.ones(len(rows.key_indptr) - 1, dtype=torch.int32),
            heads.num_q,
            heads.num_kv,
            heads.size,
            1,
            causal=is_causal,
            # Not packed beforehand: the library derives offsets from the plain mask only.
            custom_mask=None if is_causal else mask,
            q_data_type=heads.dtype,
            kv_data_type=heads.dtype,
        )
        return wrapper

    def _plan_levels(self, cascade: Cascade, shared: Tensor, own: Tensor) -> None:
        heads, levels = self._heads, (cascade.shared, cascade.own)
        self._levels.plan(
            [torch.from_numpy(level.query_indptr) for level in levels],
            [torch.from_numpy(level.key_indptr) for level in levels],
            [shared, own],
            [torch.ones(len(level.key_indptr) - 1, dtype=torch.int32) for level in levels],
            heads.num_q,
            heads.num_kv,
            heads.size,
            1,
            q_data_type=heads.dtype,
            kv_data_type=heads.dtype,
        )


def worthwhile_cascade(rows: DecodeRows, kv_cache: Sequence[Tensor]) -> Cascade | None:
    """Return ``rows`` in two levels if that saves enough reading, else None."""
    slot_bytes = sum(cache[0].nbytes for cache in kv_cache)
    if int(rows.lengths.sum()) * slot_bytes < _CASCADE_BYTES:
        return None
    cascade = cascade_of(rows)
    if cascade is None or cascade.num_saved * slot_bytes < _CASCADE_BYTES:
        return None
    return cascade


def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
