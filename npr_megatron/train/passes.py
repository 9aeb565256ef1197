"""Forward and backward over the microbatches of one rank, and what they add up to.

One path for every loss and every layout: Megatron's schedule runs the stages (1F1B when pp > 1,
interleaved over their chunks when vpp > 1), the last stage turns label log-probs into token losses,
and one all-gather makes the sums known everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from npr_megatron.config.training import LossConfig
from npr_megatron.model.build import Stage
from npr_megatron.model.gpt import stage_inputs
from npr_megatron.records.sample import PackedBatch
from npr_megatron.runtime.device import current_device
from npr_megatron.train.losses import token_losses


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What a step reports, summed over the global batch."""

    loss: float
    logprob_gap: float
    policy_logprob: float
    entropy: float
    max_logprob_gap: float

    @classmethod
    def nothing(cls) -> Sums:
        """The sums over no token."""
        return cls(loss=0.0, logprob_gap=0.0, policy_logprob=0.0, entropy=0.0, max_logprob_gap=0.0)


def run_schedule(
    stage: Stage,
    batches: Sequence[PackedBatch],
    output_fn: Callable[[Tensor, Tensor, PackedBatch], tuple[Tensor, Tensor, Any]],
    *,
    forward_only: bool,
) -> list[Any]:
    """Run Megatron's schedule and return what ``output_fn`` reported, per microbatch.

    Args:
        stage: what this rank runs; each of its chunks sees every microbatch.
        batches: this rank's microbatches, all of one shape, whole rows.
        output_fn: called on the last stage with label log-probs and entropies [B, S] and their
            tokens, those that this rank computes of the microbatch; returns the sum to
            differentiate, the number of loss tokens, and the report.
        forward_only: no backward.

    Returns:
        Reports in order on the last stage, an empty list elsewhere.
    """
    rows, length = batches[0].shape
    columns = stage.own_columns(length)

    def forward_step(iterator: Iterator[PackedBatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        own = batch.take(columns)
        inputs = stage_inputs(batch, own, stage.model, stage.dtype, stage.cp_group)
        return chunk(**inputs), lambda scores: output_fn(scores[0], scores[1], own)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in stage.wrapped],
        model=[*stage.wrapped],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )


def backward_losses(stage: Stage, batches: Sequence[PackedBatch], loss: LossConfig) -> Tensor:
    """Accumulate the gradient of ``loss``; return this rank's share for :func:`add_up`.

    Megatron divides the accumulated gradient by the loss tokens of the global batch. Reports are
    added up in fp64: a batch has more tokens than fp32 has digits for.
    """

    def sum_losses(
        policy: Tensor, entropy: Tensor, batch: PackedBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = policy.device
        rollout = torch.from_numpy(batch.rollout_logprobs).to(device)
        advantages = torch.from_numpy(batch.advantages).to(device)
        losses = token_losses(policy, rollout, advantages, loss)
        with torch.no_grad():
            gap = torch.zeros(1, device=device)
            if loss.kind != "sft":
                has_loss = torch.from_numpy(batch.labels).to(device) >= 0
                gap = ((policy - rollout) * has_loss).abs()
            sums = [values.sum(dtype=torch.float64) for values in (losses, gap, policy, entropy)]
            report = torch.stack((*sums, gap.max().double()))
        num_tokens = torch.tensor(batch.num_loss_tokens, dtype=torch.int32, device=device)
        return losses.sum(), num_tokens, report

    reports = run_schedule(stage, batches, sum_losses, forward_only=False)
    if not reports:
        return torch.zeros(5, dtype=torch.float64, device=current_device())
    stacked = torch.stack(reports)
    return torch.cat((stacked[:, :4].sum(0), stacked[:, 4:].amax(0)))


def add_up(share: Tensor, *, counts: bool) -> Sums:
    """Return the sums of the global batch on every rank.

    Args:
        share: [5] of this rank: sums of loss, gap, log-prob and entropy, and the largest gap.
        counts: False where another rank reports the same tokens (not the last stage, or not the
            first of its tensor-parallel group).
    """
    gathered = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, share if counts else torch.zeros_like(share))
    shares = torch.stack(gathered).cpu().numpy()
    loss, gap, logprob, entropy, _ = shares.sum(0)
    return Sums(
        loss=float(loss),
        logprob_gap=float(gap),
        policy_logprob=float(logprob),
        entropy=float(entropy),
        max_logprob_gap=float(shares[:, 4].max()),
    )


def forward_logprobs(stage: Stage, batches: Sequence[PackedBatch]) -> list[Tensor]:
    """Return label log-probs [B, S] of each microbatch on the last stage, nothing elsewhere.

    S are the columns that this rank computes, see ``Stage.own_columns``.
    """

    def report(policy: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return policy.sum(), torch.zeros((), dtype=torch.int32, device=policy.device), policy

    with torch.no_grad():
        return run_schedule(stage, batches, report, forward_only=True)
