"""From token ids to what the trainer learns from; labels follow the tree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from npr_megatron.records.sample import TrainingSample
from npr_megatron.records.trajectory import BoolArray, IntArray, Trajectory
from npr_megatron.topology.layout import BranchLayout, predecessors


def sft_sample(
    token_ids: Sequence[int] | IntArray, prompt_length: int, layout: BranchLayout
) -> TrainingSample:
    """Return a sample that learns every response token something predicts, forced ones included.

    Args:
        token_ids: prompt and response, [T].
        layout: of these tokens: ``layout_of`` for branches, ``plain_layout`` for sequential text.
    """
    return TrainingSample(
        token_ids=np.asarray(token_ids, dtype=np.int32),
        position_ids=layout.position_ids,
        block=layout.block,
        branch=layout.branch,
        predecessor=layout.predecessor,
        loss_mask=_is_response(len(token_ids), prompt_length) & (layout.predecessor >= 0),
    )


def rl_sample(
    trajectory: Trajectory, advantage: float, *, forced_tokens_in_loss: bool = False
) -> TrainingSample:
    """Return a sample that reinforces the sampled tokens, laid out as the engine recorded them.

    Args:
        advantage: scales the policy gradient of every learnt token.
        forced_tokens_in_loss: learn tokens the engine inserted too, as the released code does. They
            were not sampled, so their gradient is no policy gradient; off by default.
    """
    predecessor = predecessors(trajectory.block, trajectory.branch)
    loss_mask = _is_response(len(predecessor), trajectory.prompt_length) & (predecessor >= 0)
    if not forced_tokens_in_loss:
        loss_mask &= ~trajectory.forced
    return TrainingSample(
        token_ids=trajectory.token_ids,
        position_ids=trajectory.position_ids,
        block=trajectory.block,
        branch=trajectory.branch,
        predecessor=predecessor,
        loss_mask=loss_mask,
        advantage=advantage,
        rollout_logprobs=trajectory.logprobs,
        routed_experts=trajectory.routed_experts,
    )


def _is_response(num_tokens: int, prompt_length: int) -> BoolArray:
    return np.arange(num_tokens) >= prompt_length
