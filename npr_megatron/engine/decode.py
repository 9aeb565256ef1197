"""One step of decoding: lay the plan out, run the model, sample, hand every stream its token."""

from __future__ import annotations

import math
from collections.abc import Sequence

from npr_megatron.engine.compute.runner import Runner
from npr_megatron.engine.compute.sampler import choose
from npr_megatron.engine.flow.segment import Segment
from npr_megatron.engine.memory.pool import SlotPool
from npr_megatron.engine.schedule.batch import assemble
from npr_megatron.engine.schedule.feed import Feed
from npr_megatron.engine.schedule.scheduler import StepPlan


def decode(plan: StepPlan, pool: SlotPool, runner: Runner, version: int) -> list[Segment]:
    """Compute ``plan``: record the log-probs of forced tokens, take one token per stream.

    Args:
        version: that of the live weights, stamped on the tokens.

    Returns:
        Segments for which the model gave no distribution (NaN): they took no token, and their
        trajectories cannot go on. All others are as they should be.
    """
    if not plan.streams and not plan.feeds:
        return []
    batch, sampled, scored = assemble(plan.streams, plan.feeds, pool)
    logits_MV = runner.run(batch)
    if not len(logits_MV):
        return []
    known = [segment.token_ids[index] for segment, index in scored]
    tokens, logprobs = choose(logits_MV, sampled, known)
    # One NaN among a row's logits makes its sum NaN, and so the log-prob of any token.
    lost: set[int] = set()
    if not math.isfinite(sum(logprobs)):
        lost = {row for row, logprob in enumerate(logprobs) if not math.isfinite(logprob)}
    for row, (segment, index) in enumerate(scored, start=len(sampled)):
        if row not in lost:
            segment.logprobs[index] = logprobs[row]
    for row, (stream, token_id) in enumerate(zip(sampled, tokens, strict=True)):
        # A sibling earlier in this step may have ended the trajectory.
        if stream.flow.finish is not None or row in lost:
            continue
        if stream.flow.accept(stream, token_id, logprobs[row], version):
            replaced = [stream.segment.token_ids[-1]]
            _, stream.segment.logprobs[-1:] = choose(logits_MV[row : row + 1], [], replaced)
    if not lost:
        return []
    segments = [stream.segment for stream in sampled] + [segment for segment, _ in scored]
    return [segments[row] for row in sorted(lost)]


def recompute(feeds: Sequence[Feed], pool: SlotPool, runner: Runner, max_tokens: int) -> None:
    """Compute the keys and values of ``feeds`` in their slots, ``max_tokens`` at a time."""
    for feed in feeds:
        rest: Feed | None = feed
        while rest is not None:
            piece, rest = rest.take(max_tokens)
            batch, _, _ = assemble([], [piece], pool)
            runner.run(batch)
