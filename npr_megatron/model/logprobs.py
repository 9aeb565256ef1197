"""Label log-probs and entropies straight from hidden states: the logits never exist as a whole.

The head of a large vocabulary makes the largest tensor of a step, tokens x vocabulary. Here the
product with the head's weight is taken for one slice of the vocabulary at a time, summed up in
fp32, and forgotten; backward takes it again, turns it into the gradient in place, and lets both
products of the gradient follow at once. What is kept for backward is the hidden states of the
tokens that have a label, and two numbers for each. Tokens without a label are not computed at all.

    logprobs, entropies = label_scores(hidden_SBH, weight_VH, labels_SB, group=tp_group)

Each slice is a column block of the logits, so that the rows of the weight's gradient come out
complete one after another; only the gradient of the hidden states is added up over slices.
Memory, beside the result: the logits of one slice, see ``config.head_slices`` (twice in fp32 and
once in the compute dtype). No autograd state is kept under ``torch.no_grad``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from npr_megatron.config.head_slices import slice_width
from npr_megatron.model.vocab_padding import num_own_tokens


class LabelHead(ColumnParallelLinear):
    """Megatron's head, that scores labels instead of returning logits.

    A module, and not a function over another module's weight, because what waits for gathered
    weights before a forward pass hangs on the call of the module that owns them.
    """

    vocab_size: int
    """Rows over all ranks that are tokens; what stands behind them is padding."""

    @classmethod
    def take_over(cls, head: Any, vocab_size: int) -> None:
        """Make a head that Megatron has built one of these; weights and hooks stay."""
        assert type(head) is ColumnParallelLinear and head.bias is None
        own: Any = head
        own.__class__, own.vocab_size = cls, vocab_size

    def forward(self, hidden: Tensor, weight: Tensor | None, labels: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - it answers another question
        """Return what :func:`label_scores` does.

        Args:
            hidden: [S, B, H], or [S/tp, B, H] under sequence parallelism.
            weight: that of the embedding where it is tied and lives there, else None.
            labels: [S, B], see :func:`label_scores`.
        """
        weight = self.weight if weight is None else weight
        assert weight is not None, "a head without a weight is given that of the embedding"
        group: Any = self.tp_group
        num_rows = len(weight)
        num_tokens = num_own_tokens(num_rows, self.vocab_size, group)
        return label_scores(
            hidden,
            # No logit of padding is computed: it has no probability and no gradient.
            weight if num_tokens == num_rows else weight[:num_tokens],
            labels,
            group=group,
            first_token=group.rank() * num_rows,
            is_sequence_parallel=self.sequence_parallel,
        )


def label_scores(
    hidden_SBH: Tensor,
    weight_VH: Tensor,
    labels_SB: Tensor,
    *,
    group: ProcessGroup,
    first_token: int | None = None,
    is_sequence_parallel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the natural-log probability of each label and the entropy of its distribution.

    Args:
        hidden_SBH: [S, B, H] in the compute dtype; [S/tp, B, H] if ``is_sequence_parallel``.
        weight_VH: [V/tp, H], this rank's rows of the head.
        labels_SB: [S, B] int64 token ids, best on the CPU: which of them are labels decides how
            much is computed. -1 gives 0.0 without gradient, and no entropy.
        group: the ranks that the vocabulary is cut over.
        first_token: id of this rank's first row; None where all ranks have equally many rows.

    Returns:
        Two of [S, B] fp32, equal on every rank of ``group``. The first is differentiable in hidden
        states and weight; the entropy [nats] is a measurement and gives no gradient.
    """
    if is_sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(
            hidden_SBH, tensor_parallel_output_grad=True, group=group
        )
    else:
        hidden_SBH = copy_to_tensor_model_parallel_region(hidden_SBH, group=group)
    device = hidden_SBH.device
    flat = labels_SB.reshape(-1)
    places = torch.nonzero(flat >= 0)[:, 0]
    if first_token is None:
        first_token = group.rank() * len(weight_VH)
    labels_T = flat[places].to(device) - first_token
    places = places.to(device)
    rows_TH = hidden_SBH.flatten(0, 1).index_select(0, places)
    scores: tuple[Tensor, Tensor] = _LabelScores.apply(rows_TH, weight_VH, labels_T, group)
    nothing = torch.zeros(flat.shape, dtype=torch.float32, device=device)
    logprobs, entropies = (
        nothing.index_copy(0, places, values).view(labels_SB.shape) for values in scores
    )
    return logprobs, entropies


class _LabelScores(torch.autograd.Function):
    """Label ids are counted from the first of this rank's rows; those of other ranks lie outside.

    T tokens, H channels, V rows of the weight here. ``top`` [T] is the largest logit, ``total``
    [T] the sum of exp(logit - top), both over all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        top, total, weighted, label = _summed_over(
            group, *_sums_of_rank(rows_TH, weight_VH, labels_T)
        )
        ctx.save_for_backward(rows_TH, weight_VH, labels_T, top, total)
        log_total = total.log()
        entropies = log_total - weighted / total
        ctx.mark_non_differentiable(entropies)
        return label - top - log_total, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_TH, weight_VH, labels_T, top, total = ctx.saved_tensors
        grad_T = grads[0]
        scale_T1 = -(grad_T / total)[:, None]
        grad_rows = torch.zeros(rows_TH.shape, dtype=torch.float32, device=rows_TH.device)
        grad_weight = torch.empty_like(weight_VH)
        for part, logits in _slices(rows_TH, weight_VH):
            at, is_here = _place_in(part, labels_T)
            grad_logits = logits.sub_(top[:, None]).exp_().mul_(scale_T1)
            grad_logits.scatter_add_(1, at, torch.where(is_here, grad_T, 0.0)[:, None])
            grad_logits = grad_logits.to(weight_VH.dtype)
            if weight_VH.dtype == torch.float32:
                grad_rows.addmm_(grad_logits, weight_VH[part])
            else:
                grad_rows.add_(grad_logits @ weight_VH[part])
            torch.mm(grad_logits.t(), rows_TH, out=grad_weight[part])
            del logits, grad_logits  # before the next slice is there
        return grad_rows.to(rows_TH.dtype), grad_weight, None, None


def _sums_of_rank(
    rows_TH: Tensor, weight_VH: Tensor, labels_T: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return over this rank's share of the vocabulary, each [T] fp32:

    the largest logit, the sums of exp(logit - largest) and of exp(logit - largest) * (logit -
    largest), and the logit of the label (0.0 where another rank has it).
    """
    shape, device = labels_T.shape, rows_TH.device
    top = torch.full(shape, torch.finfo(torch.float32).min, device=device)
    total, weighted, label = torch.zeros(3, *shape, device=device)
    for part, logits in _slices(rows_TH, weight_VH):
        at, is_here = _place_in(part, labels_T)
        label = torch.where(is_here, logits.gather(1, at)[:, 0], label)
        new_top = torch.maximum(top, logits.amax(1))
        total, weighted = _rebased(total, weighted, top - new_top)
        powers = logits.sub_(new_top[:, None]).exp()
        total = total + powers.sum(1)
        weighted = weighted + powers.mul_(logits).sum(1)
        top = new_top
        del logits, powers
    return top, total, weighted, label


def _summed_over(
    group: ProcessGroup, top: Tensor, total: Tensor, weighted: Tensor, label: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same four over the whole vocabulary."""
    if group.size() == 1:
        return top, total, weighted, label
    highest = top.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    total, weighted = _rebased(total, weighted, top - highest)
    sums = torch.stack((total, weighted, label))
    dist.all_reduce(sums, group=group)
    return highest, sums[0], sums[1], sums[2]


def _rebased(total: Tensor, weighted: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sums relative to a largest logit that is ``-shift`` above the present one."""
    factor = shift.exp()
    return total * factor, (weighted + total * shift.clamp_min(-1e4)) * factor


def _slices(rows_TH: Tensor, weight_VH: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits [T, part] of one part of the vocabulary after another: fp32, to use up."""
    width = slice_width(len(rows_TH), len(weight_VH))
    for start in range(0, len(weight_VH), max(width, 1)):
        part = slice(start, min(start + width, len(weight_VH)))
        yield part, (rows_TH @ weight_VH[part].t()).float()


def _place_in(part: slice, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the column [T, 1] of each label in a part of the vocabulary, and whether [T] it is
    there; elsewhere any column."""
    at = labels_T - part.start
    is_here = (at >= 0) & (labels_T < part.stop)
    return at.clamp(0, part.stop - part.start - 1)[:, None], is_here
