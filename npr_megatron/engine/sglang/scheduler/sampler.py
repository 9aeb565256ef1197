"""The project's own draw for stages, in the place of SGLang's.

Stages are drawn by ``engine.compute`` with the numbers of ``records.randomness``, so a trajectory
is the embedded engine's whatever shares its batch; their log-probs are those of the full
distribution at temperature 1. Ordinary requests are drawn by SGLang, also in a batch with stages.

It wraps ``Sampler.forward`` and is no sampler backend of its own, since SGLang sets the backend on
a CPU, and its sampler cannot filter under a name that it does not know: ordinary requests would
fail.

A row that is no distribution (NaN among its logits) takes some token and the log-prob NaN, which
reaches the client: that is how it learns that its trajectory has failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npr_megatron.engine.compute.sampler import SamplingRows, draw_with_totals
from npr_megatron.engine.sglang.scheduler.draws import Draws
from npr_megatron.engine.sglang.stage import UNTAUGHT

_DRAWS = "npr_draws"


def attach(sampling_info: Any, draws: Draws) -> None:
    """Hand the draws of a batch to its sampler, with SGLang's own ``SamplingBatchInfo``."""
    setattr(sampling_info, _DRAWS, draws)


def sample(
    sample_ordinary: Callable[..., Tensor],
    sampler: Any,
    logits_output: Any,
    sampling_info: Any,
    return_logprob: bool,
    top_logprobs_nums: list[int],
    token_ids_logprobs: list[list[int]],
    positions: Tensor,
    **kwargs: Any,
) -> Tensor:
    """Return [M] tokens and write their log-probs to ``logits_output``, as ``Sampler.forward``."""
    draws: Draws | None = getattr(sampling_info, _DRAWS, None)
    arguments = (return_logprob, top_logprobs_nums, token_ids_logprobs, positions)
    if draws is None:
        return sample_ordinary(sampler, logits_output, sampling_info, *arguments, **kwargs)
    logits_MV = logits_output.next_token_logits
    is_all = len(draws.rows) == len(logits_MV)
    ours: slice | Tensor = slice(None)
    if not is_all:
        ours = torch.from_numpy(draws.rows).to(logits_MV.device, non_blocking=True)
    tokens_N, logprobs_N = draw_stages(logits_MV[ours], draws)
    wants_others = any(top_logprobs_nums or ()) or any(token_ids_logprobs or ())
    if is_all and not wants_others:
        tokens_M = tokens_N
        if return_logprob:
            logits_output.next_token_logprobs = logprobs_N
    else:  # SGLang overwrites the logits: ours were drawn before
        tokens_M = sample_ordinary(sampler, logits_output, sampling_info, *arguments, **kwargs)
        tokens_M[ours] = tokens_N.to(tokens_M.dtype)
        if return_logprob:
            logits_output.next_token_logprobs[ours] = logprobs_N
    sampler._sync_token_ids_across_tp(tokens_M, sampling_info)
    return tokens_M


def draw_stages(logits_NV: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Return [N] int64 tokens and [N] fp32 log-probs of the full distribution."""
    logits_NV = logits_NV.float()
    tokens_N, totals_N = draw_with_totals(logits_NV, SamplingRows(draws.shape, draws.uniforms))
    if (draws.taught != UNTAUGHT).any():
        taught_N = torch.from_numpy(draws.taught).to(tokens_N.device, non_blocking=True)
        tokens_N = torch.where(taught_N == UNTAUGHT, tokens_N, taught_N)
    logprobs_N = logits_NV.gather(-1, tokens_N[:, None])[:, 0] - totals_N
    return tokens_N, logprobs_N.float()
