"""Positions of tokens whose linear form is longer than their path.

SGLang numbers the tokens of a request through. Behind a join the branches stand one behind the
other in a row but side by side in the trajectory, so every token that is computed behind them has
its index plus one constant, which is zero or negative. A constant is right in prefill, in chunks of
it, in mixed batches, in decoding and after retraction, whatever part of the row is recomputed: what
lies before the constant's range is never recomputed (``radix_cache``).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Offsets:
    """One offset per request of a batch, on the device of the positions.

    A batch that decodes keeps its requests for many steps: the tensor of the last one is kept, so
    that most steps copy nothing to the device.
    """

    def __init__(self) -> None:
        self._offsets: tuple[int, ...] = ()
        self._tensor = torch.empty(0, dtype=torch.int64)

    def added(
        self, positions_T: Tensor, offsets: tuple[int, ...], extend_lens_M: Tensor | None = None
    ) -> Tensor:
        """Return [T] shifted positions; the argument itself where there is nothing to shift.

        Never negative: rows of a request that was refused are computed all the same, with positions
        that mean nothing, and a negative one would read outside the rotary table.

        Args:
            offsets: of M requests.
            extend_lens_M: tokens of each request, in prefill; None is one each.
        """
        if not any(offsets):
            return positions_T
        shift = self._on_device(offsets, positions_T)
        if extend_lens_M is not None:
            shift = torch.repeat_interleave(shift, extend_lens_M, output_size=len(positions_T))
        return (positions_T + shift).clamp_(min=0)

    def _on_device(self, offsets: tuple[int, ...], like: Tensor) -> Tensor:
        kept = self._tensor
        if offsets != self._offsets or (kept.device, kept.dtype) != (like.device, like.dtype):
            self._offsets = offsets
            self._tensor = torch.tensor(offsets, dtype=like.dtype).to(
                like.device, non_blocking=True
            )
        return self._tensor
