"""The decode step in fixed memory: what a graph captures, and what runs eagerly to check it.

Everything a step needs lies at addresses that never change: token ids, positions, slots, lengths
and the slots each row reads come in by one copy, logits go out by one buffer. Shapes are those of a
bucket; the forward pass asks the host nothing, so the same kernels serve every step of a bucket.

Rows beyond the live ones are padding: token 0 at position 0, reading the dummy slot 0 only. What
they compute is thrown away, but they have to write somewhere, and not to slot 0: rows shorter than
their bucket read it under a mask, and no mask takes away a NaN that broken weights once left there.
They write to a spare slot behind the pool, which nobody reads, so the model of a static step has
one slot more than its pool, and slot 0 stays zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from npr_megatron.engine.compute.attention import PooledAttention
from npr_megatron.engine.compute.decode_rows import (
    Bucket,
    BucketLimits,
    DecodeRows,
    bucket_for,
    round_up_rows,
)
from npr_megatron.engine.compute.device_batch import DeviceGroup
from npr_megatron.engine.compute.model import Attend, EngineModel
from npr_megatron.engine.compute.routes import RouteCache
from npr_megatron.engine.compute.transfer import Staging

_NUM_FIELDS = 5
_INT_BYTES = 4
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of attention over gathered slots. Not cuDNN, which builds an execution plan per shape."""


class KeyReader(Protocol):
    """How the rows of a bucket find and read their keys, in fixed memory."""

    limits: BucketLimits

    def bucket(self, rows: DecodeRows) -> Bucket | None:
        """Return the bucket that holds ``rows``, None if none does."""
        ...

    def fill(self, rows: DecodeRows, bucket: Bucket, reads: npt.NDArray[np.int32]) -> int:
        """Write what :meth:`attention` will find in ``reads``; return how much of it is used."""
        ...

    def plan(self, rows: DecodeRows, bucket: Bucket, reads: Tensor, used: int) -> None:
        """Prepare the next pass on the host; the first ``used`` of ``reads`` are on their way to
        the device.
        """
        ...

    def attention(self, bucket: Bucket, slots: Tensor, lengths: Tensor, reads: Tensor) -> Attend:
        """Return the attention of a bucket; asks the host nothing.

        Args:
            slots: [B] int64 slots the new keys and values go to.
            lengths: [B] int32 slots each row reads.
            reads: [max_reads] int32 as filled by :meth:`fill`.
        """
        ...


class GatherReader:
    """Copies the slots of all rows side by side, padded to the bucket, then attends.

    Needs nothing but torch. Each layer moves keys and values three times (read, write, read again),
    and the padding with them.
    """

    def __init__(self, kv_cache: Sequence[Tensor], limits: BucketLimits) -> None:
        self.limits = limits
        self._kv_cache = kv_cache

    def bucket(self, rows: DecodeRows) -> Bucket | None:
        """Return the bucket that holds ``rows``, None if none does."""
        return bucket_for(len(rows.token_ids), rows.longest, self.limits)

    def fill(self, rows: DecodeRows, bucket: Bucket, reads: npt.NDArray[np.int32]) -> int:
        """Write the [B, L] table of slots."""
        used = bucket.num_rows * bucket.num_keys
        rows.write_table(reads[:used].reshape(bucket))
        return used

    def plan(self, rows: DecodeRows, bucket: Bucket, reads: Tensor, used: int) -> None:
        """Nothing is left to prepare: the table is all."""

    def attention(self, bucket: Bucket, slots: Tensor, lengths: Tensor, reads: Tensor) -> Attend:
        """Return attention over the gathered slots, those behind a row's length masked."""
        offsets = torch.arange(bucket.num_keys, device=reads.device)
        group = DeviceGroup(
            start=0,
            count=bucket.num_rows,
            num_rows=bucket.num_rows,
            num_shared=0,
            keys=reads[: bucket.num_rows * bucket.num_keys].view(bucket),
            visible=(offsets < lengths[:, None])[:, None, None],
            padded=None,
            kept=None,
        )
        return PooledAttention(self._kv_cache, slots, [group])


class StaticDecode:
    """Fixed memory of the decode step, and the forward pass on it.

    Use: ``load``, then ``forward`` or the replay of its capture, then ``result``.

    Args:
        model: its last slot is the spare one, and its passes ask the host nothing.
        routes: where experts are recorded, of as many slots; None records nothing.
    """

    def __init__(
        self, model: EngineModel, reader: KeyReader, routes: RouteCache | None = None
    ) -> None:
        self._model = model
        self._routes = routes
        self.reader = reader
        max_rows = round_up_rows(reader.limits.max_rows)
        self._num_fields = _NUM_FIELDS * max_rows
        num_ints = self._num_fields + reader.limits.max_reads
        self._ints = torch.zeros(num_ints, dtype=torch.int32, device=model.device)
        self._fields = self._ints[: self._num_fields].view(_NUM_FIELDS, max_rows)
        self._reads = self._ints[self._num_fields :]
        self._logits = torch.zeros(max_rows, model.config.vocab_size, device=model.device)
        self._staging = Staging(model.device)
        self._padding = _padding(len(model.kv_cache[0]) - 1)

    def run(self, rows: DecodeRows) -> Tensor | None:
        """Return [M, V] fp32 logits, or None where no bucket holds ``rows``. Captures nothing."""
        bucket = self.reader.bucket(rows)
        if bucket is None:
            return None
        self.load(rows, bucket)
        self.forward(bucket)
        return self.result(len(rows.logit_index))

    def load_padding(self, bucket: Bucket) -> None:
        """Send a step that is padding all over: its passes change nothing anybody reads."""
        self.load(self._padding, bucket)

    def load(self, rows: DecodeRows, bucket: Bucket) -> None:
        """Send ``rows`` to the static buffers, and padding behind them."""
        num_ints = len(self._ints)
        ints = self._staging.reserve(num_ints * _INT_BYTES)[: num_ints * _INT_BYTES].view(np.int32)
        fields = ints[: self._num_fields].reshape(_NUM_FIELDS, -1)
        _write_fields(fields, self._padding, stop=fields.shape[1])
        _write_fields(fields, rows, stop=len(rows.token_ids))
        used = self.reader.fill(rows, bucket, ints[self._num_fields :])
        self._staging.send(self._ints[: self._num_fields + used].view(torch.uint8))
        self.reader.plan(rows, bucket, self._reads, used)

    def forward(self, bucket: Bucket) -> None:
        """Run the model on the static buffers; no result is read, nothing waits."""
        token_ids, position_ids, slots, lengths, _ = self._fields[:, : bucket.num_rows]
        slots = slots.long()  # index_copy_ takes no int32; converted once, not once a layer
        attend = self.reader.attention(bucket, slots, lengths, self._reads)
        record = None if self._routes is None else self._routes.recorder(slots)
        with sdpa_kernel(_BACKENDS):
            hidden = self._model.hidden(token_ids, position_ids, attend, record)
        self._logits[: bucket.num_rows].copy_(self._model.logits(hidden))

    def result(self, num_logits: int) -> Tensor:
        """Return [M, V] logits in the order asked for: a copy, for the buffer is the next step's
        too.
        """
        return self._logits.index_select(0, self._fields[4, :num_logits])


def _padding(spare_slot: int) -> DecodeRows:
    """Return what every row beyond the live ones does."""
    return DecodeRows(
        token_ids=np.zeros(1, np.int64),
        position_ids=np.zeros(1, np.int64),
        slots=np.full(1, spare_slot),
        logit_index=np.zeros(1, np.int64),
        lengths=np.ones(1, np.int64),
        blocks=[np.zeros((1, 1), np.int64)],
        num_shared=[0],
    )


def _write_fields(fields: npt.NDArray[np.int32], rows: DecodeRows, stop: int) -> None:
    fields[0, :stop] = rows.token_ids
    fields[1, :stop] = rows.position_ids
    fields[2, :stop] = rows.slots
    fields[3, :stop] = rows.lengths
    fields[4, : len(rows.logit_index)] = rows.logit_index
