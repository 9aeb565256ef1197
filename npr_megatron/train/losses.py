"""SFT, DAPO and PAPO as functions of per-token log-probs: all that tells the three apart.

Pure: tensors in, tensor out. Each function returns the loss of every token, of the shape of its
arguments, whose sum over the global batch divided by its number of loss tokens is the loss. Tokens
without loss have log-probs and advantage 0.0 and receive no gradient (see ``model.logprobs``), so
nothing here looks at a loss mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npr_megatron.config.training import LossConfig


def token_losses(
    policy_logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, loss: LossConfig
) -> Tensor:
    """Return the loss of each token under the kind of loss that ``loss`` names."""
    match loss.kind:
        case "sft":
            return sft(policy_logprobs)
        case "papo":
            return papo(policy_logprobs, advantages)
        case "dapo":
            return dapo(
                policy_logprobs,
                rollout_logprobs,
                advantages,
                clip_low=loss.clip_low,
                clip_high=loss.clip_high,
                dual_clip=loss.dual_clip,
            )


def sft(policy_logprobs: Tensor) -> Tensor:
    """Return the negative log-likelihood."""
    return -policy_logprobs


def papo(policy_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Return -(pi / sg[pi]) * A: value -A, gradient -A * grad log pi, never clipped.

    Source: arXiv 2512.07461, Eq. 6.
    """
    ratio = torch.exp(policy_logprobs - policy_logprobs.detach())
    return -ratio * advantages


def dapo(
    policy_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> Tensor:
    """Return the clipped surrogate with decoupled bounds and dual clip.

    The ratio pi / pi_rollout is held within [1 - clip_low, 1 + clip_high] where moving further
    would raise the objective; for negative advantages the loss is bounded by ``dual_clip`` * |A|.

    Source: DAPO (arXiv 2503.14476) Eq. 8; dual clip from arXiv 1912.09729 Eq. 5.
    """
    ratio = torch.exp(policy_logprobs - rollout_logprobs)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    pessimistic = torch.maximum(-ratio * advantages, -clipped * advantages)
    bounded = torch.minimum(pessimistic, -dual_clip * advantages)
    return torch.where(advantages < 0, bounded, pessimistic)
