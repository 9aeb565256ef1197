"""Who sees whom: the attention rule, stated once for numpy and torch.

Two integers per token decide it: the parallel block (0 on the trunk) and the branch inside it (0 on
the trunk; a block is 0 exactly where its branch is). Branches of one block are blind to each other;
everything else is causal. The dense mask is the reference for every kernel and what the CPU trainer
uses for short rows; its memory grows with S squared, so long contexts use a block-sparse kernel
built from :func:`visible`, or none (``topology.attention_plan``).

Only operators both libraries share are used, so numpy arrays give numpy masks and tensors give
tensors, on their device. This module imports neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from torch import Tensor

    from npr_megatron.records.trajectory import BoolArray, IntArray


def visible(query_block: Any, query_branch: Any, key_block: Any, key_branch: Any) -> Any:
    """Return True where a query may look at a key that stands before it in the same sample.

    The four label arrays (all numpy or all torch) broadcast against each other. A key of another
    block, or of the trunk as seen from a branch, has another block number; within a block only the
    own branch is seen, and on the trunk (block = branch = 0) everything.

    Source:
        arXiv 2512.07461, Algorithm 1, as a predicate.
    """
    return (key_block != query_block) | (key_branch == query_branch)


@overload
def dense_mask(segment: IntArray, block: IntArray, branch: IntArray) -> BoolArray: ...
@overload
def dense_mask(segment: Tensor, block: Tensor, branch: Tensor) -> Tensor: ...
def dense_mask(segment: Any, block: Any, branch: Any) -> Any:
    """Return the attention mask of packed rows, True where visible.

    Args:
        segment: [..., S] integer; number of the sample in its row, -1 on padding.
        block: [..., S] integer; 1-based parallel block of a branch token, 0 on the trunk.
        branch: [..., S] integer; 1-based branch, 0 on the trunk.

    Returns:
        [..., S, S] bool, query by key. A padding token sees itself only, so no row is empty.
    """
    # A running count of ones: arange without naming a library, and on the device of the input.
    offset = (segment == segment).cumsum(-1)
    # Padding token s becomes a sample of its own, so it needs no pass over [S, S].
    sample = segment - (segment < 0) * offset
    mask = visible(
        block[..., :, None], branch[..., :, None], block[..., None, :], branch[..., None, :]
    )
    mask &= sample[..., :, None] == sample[..., None, :]
    row = offset.reshape(-1, offset.shape[-1])[0]  # the same in every row
    mask &= row[:, None] >= row
    return mask
