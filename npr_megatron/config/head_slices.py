"""How the head's logits are cut into slices that exist one at a time: pure arithmetic.

``model.logprobs`` computes so, ``config.device_memory`` counts so.
"""

from __future__ import annotations

SLICE_ELEMENTS = 2**23
"""Logits that exist at a time. In fp32 they fit into the caches of a GPU (32 MiB), where everything
between the matrix products is done; on a CPU sizes from 2**22 to 2**25 are equally fast."""
_LEAST_WIDTH = 512
"""Narrower slices make poor matrix products."""
_WIDTH_MULTIPLE = 128


def slice_width(num_tokens: int, vocab_size: int) -> int:
    """Return how many ids of a vocabulary (of one rank) a slice over ``num_tokens`` tokens has."""
    width = SLICE_ELEMENTS // max(num_tokens, 1) // _WIDTH_MULTIPLE * _WIDTH_MULTIPLE
    return min(max(width, _LEAST_WIDTH), vocab_size)
