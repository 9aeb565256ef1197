"""Log-probabilities of labels under logits whose vocabulary is split over tensor-parallel ranks."""

from __future__ import annotations

from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


def label_logprobs(logits_SBV: Tensor, labels_SB: Tensor) -> Tensor:
    """Return the natural-log probability of each label, in fp32 and differentiable in the logits.

    Megatron's cross entropy subtracts the maximum *in place* when its input already is fp32: the
    caller's ``logits_SBV`` are garbage afterwards, which saves the largest tensor of the step a
    copy.

    Args:
        logits_SBV: [S, B, V/tp], this rank's share of the vocabulary. Consumed.
        labels_SB: [S, B] int64 token ids; -1 gives 0.0 without gradient.

    Returns:
        [S, B] fp32, equal on every tensor-parallel rank.
    """
    cross_entropy = vocab_parallel_cross_entropy(logits_SBV.float(), labels_SB.clamp_min(0))
    return (-cross_entropy).masked_fill(labels_SB < 0, 0.0)
