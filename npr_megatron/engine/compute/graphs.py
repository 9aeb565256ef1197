"""The decode step as CUDA graphs: one launch instead of some fifteen per layer.

A decode step of a small model is bound by launches, not by arithmetic: the host needs longer to ask
for a kernel than the device to run it. A graph is asked for once. One is captured per bucket, when
the bucket first occurs; all share one memory pool, since no two run at once and nothing but the
static buffers outlives a replay.

A graph holds addresses, not values. New weights are copied into the live storages in place
(``LiveWeights``), keys and values into the same pool, so a commit leaves every graph valid and none
is ever captured again. Whoever replaces a storage by another tensor breaks this, and a test would
see the old policy (``tests/unit/engine/test_cuda.py``).

Other threads may stage weights on the device while a graph is captured, so only calls of this
thread are held to the rules of capture.

Numerics: a replay runs the kernels that the eager pass on the same bucket runs, and the tests hold
it to the same bits. Other buckets and the ragged pass take other kernels and other orders of
summation, and in bf16 that shows. So on CUDA, other than on a CPU in fp32, which requests share a
step may change a sampled token, and a schedule is not promised to reproduce another one's text.
Logits leave the model as fp32, and log-sum-exp, sampling weights and recorded log-probs are
computed from them in fp32 or wider, on every path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npr_megatron.engine.compute.decode_rows import Bucket, DecodeRows
from npr_megatron.engine.compute.static_decode import StaticDecode

_WARM_UPS = 2
"""Passes before a capture: libraries load kernels, choose algorithms and allocate on first use."""


class GraphedDecode:
    """Captures of a decode step, by bucket. Needs a CUDA device."""

    def __init__(self, decode: StaticDecode, device: torch.device) -> None:
        self._decode = decode
        self._device = device
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    @property
    def num_graphs(self) -> int:
        """Buckets captured so far."""
        return len(self._graphs)

    @torch.inference_mode()
    def run(self, rows: DecodeRows) -> Tensor | None:
        """Return [M, V] fp32 logits, or None where no bucket holds ``rows``."""
        bucket = self._decode.reader.bucket(rows)
        if bucket is None:
            return None
        with torch.cuda.device(self._device):
            if bucket not in self._graphs:
                self._graphs[bucket] = self._capture(bucket)
            self._decode.load(rows, bucket)
            self._graphs[bucket].replay()
            return self._decode.result(len(rows.logit_index))

    def _capture(self, bucket: Bucket) -> torch.cuda.CUDAGraph:
        """Capture the pass of ``bucket``, which runs over padding meanwhile."""
        self._decode.load_padding(bucket)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                self._decode.forward(bucket)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
        ):
            self._decode.forward(bucket)
        return graph
