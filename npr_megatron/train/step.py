"""What goes into one optimizer step and what comes out. numpy only: both cross process borders."""

from __future__ import annotations

from dataclasses import dataclass

from npr_megatron.config.training import LossConfig, ParallelConfig
from npr_megatron.errors import InputError
from npr_megatron.records.sample import PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepBatch:
    """The whole global batch of one step; every rank gets all of it and takes its share.

    Example: dp_size 2 and four microbatches of [8, 256]; data-parallel rank 1 takes the second and
    the fourth.
    """

    microbatches: tuple[PackedBatch, ...]
    """All of one shape; their number is a multiple of ``ParallelConfig.microbatch_multiple``."""
    loss: LossConfig

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that carry loss, over all microbatches: the denominator of the loss."""
        return sum(batch.num_loss_tokens for batch in self.microbatches)

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding, over all microbatches."""
        return sum(batch.num_tokens for batch in self.microbatches)

    def share(self, dp_rank: int, parallel: ParallelConfig) -> tuple[PackedBatch, ...]:
        """Return the microbatches of one data-parallel rank, in order.

        Raises:
            InputError: shapes differ, or do not divide over the ranks.
        """
        check_microbatches(self.microbatches, parallel)
        return self.microbatches[dp_rank :: parallel.dp_size]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One optimizer step, as every rank saw it. Means are over the loss tokens of the global batch.

    The value of a PAPO loss is -mean(advantage) whatever the policy; watch ``mean_policy_logprob``.
    """

    loss: float
    grad_norm: float
    """Global L2 norm before clipping; NaN where the loss was not finite."""
    learning_rate: float
    num_loss_tokens: int
    num_tokens: int
    """Not padding."""
    max_logprob_gap: float
    """Largest |policy - rollout| log-prob of a loss token, before the update; 0.0 for SFT."""
    mean_logprob_gap: float
    mean_policy_logprob: float
    mean_entropy: float
    """Of the policy over the whole vocabulary, before the update [nats]."""
    skipped: bool = False
    """Neither weights nor optimizer moved: no token carried loss, or ``fault`` says why not."""
    fault: str = ""
    """What was wrong with the numbers of a step that was skipped, and where it first showed. The
    schedule moved on."""


def check_microbatches(
    microbatches: tuple[PackedBatch, ...], parallel: ParallelConfig
) -> tuple[int, int]:
    """Return the common shape (B, S) of ``microbatches``.

    Raises:
        InputError: there are none, shapes differ, or they do not divide over the ranks.
    """
    shapes = {batch.shape for batch in microbatches}
    if len(shapes) != 1:
        raise InputError(
            f"a step takes microbatches of one shape, found {sorted(shapes) or 'none'}; "
            "pack all samples of a step together"
        )
    if len(microbatches) % parallel.microbatch_multiple:
        turns = f", and over pp_size {parallel.pp_size} in turns" if parallel.vpp_size > 1 else ""
        raise InputError(
            f"{len(microbatches)} microbatches do not divide over dp_size {parallel.dp_size}"
            f"{turns}; pack with num_replicas = {parallel.microbatch_multiple}"
        )
    rows, length = next(iter(shapes))
    if length % parallel.row_slices:
        raise InputError(
            f"rows of {length} tokens do not divide into the {parallel.row_slices} slices of "
            f"tp_size {parallel.tp_size} and cp_size {parallel.cp_size}; pad rows to a multiple "
            "of them"
        )
    return rows, length
