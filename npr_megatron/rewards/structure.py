"""The structural filter: may a parallel rollout train the model (arXiv 2512.07461, section 2.4)?

The release asks its mask and position builders instead of a regular expression, because text checks
miss corner cases; here the grammar and the one layout rule are asked, against what the engine did.
"""

from __future__ import annotations

import numpy as np

from npr_megatron.errors import LayoutError
from npr_megatron.records.trajectory import FinishReason, Trajectory
from npr_megatron.schema.tags import Vocabulary
from npr_megatron.topology.cursor import Convention
from npr_megatron.topology.layout import layout_of

LAYOUT_MISMATCH = "layout_mismatch"
"""The engine placed a token elsewhere than the layout rule: a fault of ours, never of the model."""


def drop_reason(
    trajectory: Trajectory, vocabulary: Vocabulary, convention: Convention = "canonical"
) -> str:
    """Return why a rollout must not be learnt from; empty if it may be.

    It may if it stopped by itself, is well-formed, and was decoded where the layout rule says. The
    answer plays no part. A reason is a rule of the grammar, a finish reason or ``LAYOUT_MISMATCH``.
    """
    if trajectory.finish is not FinishReason.STOP:
        return trajectory.finish_detail or trajectory.finish.value
    try:
        layout = layout_of(trajectory.token_ids, trajectory.prompt_length, vocabulary, convention)
    except LayoutError:
        return FinishReason.MALFORMED.value
    agrees = (
        np.array_equal(layout.block, trajectory.block)
        and np.array_equal(layout.branch, trajectory.branch)
        and np.array_equal(layout.position_ids, trajectory.position_ids)
    )
    return "" if agrees else LAYOUT_MISMATCH


def is_own_fault(trajectory: Trajectory, reason: str) -> bool:
    """Whether the model itself earned ``reason``: it broke the schema or ran out of budget."""
    return trajectory.finish.is_of_policy and reason != LAYOUT_MISMATCH
