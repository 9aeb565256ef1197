"""How much attention a sample costs: the number of (query, key) pairs that see one another."""

from __future__ import annotations

import numpy as np

from npr_megatron.records.trajectory import BoolArray, IntArray


def num_visible_pairs(block: IntArray, branch: IntArray) -> int:
    """Return the number of True cells in the attention mask of one sample, without building it.

    A token sees everything up to itself, save the branches of its own block that stand between the
    fork and its own branch. Branches of a block stand next to one another, in order.

    Args:
        block: [T] 1-based parallel block of a branch token; 0 on the trunk.
        branch: [T] 1-based branch inside the block; 0 on the trunk.

    Example:
        one trunk token, then two branches of two tokens: 1 + (2 + 3) + (2 + 3) = 11 of 15.
    """
    offset = np.arange(len(block), dtype=np.int64)
    opens_block = changes(block)
    opens_branch = opens_block | changes(branch)
    hidden = _last(offset, opens_branch) - _last(offset, opens_block)
    return int((offset + 1 - hidden).sum())


def changes(labels: IntArray) -> BoolArray:
    """Return where a label differs from the one before it; the first one does."""
    found = np.ones(len(labels), dtype=np.bool_)
    found[1:] = labels[1:] != labels[:-1]
    return found


def _last(offset: np.ndarray, opens: np.ndarray) -> np.ndarray:
    """Return, per token, where the run it stands in begins."""
    return np.maximum.accumulate(np.where(opens, offset, 0))
