"""Advantages from rewards. Pure numpy; ragged, because malformed rollouts are dropped before.

Rewards come as one array per prompt, holding the kept rollouts of that prompt in order. The result
has the same outer length; ``None`` stands for a prompt group that carries no gradient and must not
be trained on, so it takes no part in the token mean either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from npr_megatron.errors import InputError

FloatVector = npt.NDArray[np.float32]
_EPSILON = 1e-6


def papo_advantages(rewards_P_G: Sequence[npt.ArrayLike]) -> list[FloatVector | None]:
    """Return (R - mean of its prompt group) / std of all kept rewards of the batch.

    The standard deviation (population, plus 1e-6) is taken once, over the raw rewards of the groups
    that stay. Groups with fewer than two survivors are dropped: against itself a reward is no news.

    Source: arXiv 2512.07461, Eq. 5.
    """
    groups = [_as_rewards(rewards) for rewards in rewards_P_G]
    kept = [group for group in groups if len(group) >= 2]
    if not kept:
        return [None] * len(groups)
    scale = np.concatenate(kept).std() + _EPSILON
    return [
        ((group - group.mean()) / scale).astype(np.float32) if len(group) >= 2 else None
        for group in groups
    ]


def dapo_advantages(rewards_P_G: Sequence[npt.ArrayLike]) -> list[FloatVector | None]:
    """Return (R - mean) / std within each prompt group; groups of equal rewards are dropped.

    Source: DAPO (arXiv 2503.14476), Eq. 9 and dynamic sampling.
    """
    groups = [_as_rewards(rewards) for rewards in rewards_P_G]
    return [
        ((group - group.mean()) / (group.std() + _EPSILON)).astype(np.float32)
        if len(group) >= 2 and np.ptp(group) > 0
        else None
        for group in groups
    ]


def _as_rewards(rewards: npt.ArrayLike) -> npt.NDArray[np.float64]:
    group = np.asarray(rewards, dtype=np.float64)
    if group.ndim != 1 or not np.isfinite(group).all():
        raise InputError(
            f"rewards of a prompt group must be a vector of finite numbers, found {group!r}; "
            "score every kept rollout once"
        )
    return group
