"""Log-probs of known tokens, taken from where they lie among those of a batch.

SGLang goes through the requests of a prefill with a cursor into the log-probs of all of them, and
does not move it past a request that was aborted or retracted while the batch ran: those behind it
are given numbers of others. Here the cursor follows from the batch and not from who is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_PROCESSOR = (
    "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor"
)
TARGETS = (
    f"{_PROCESSOR}._apply_prefill_logprobs",
    f"{_PROCESSOR}._apply_chunked_prefill_logprobs",
)
"""Both hand the log-probs of one request on and return the cursor behind them."""


def with_own_cursor(
    apply: Callable[..., int],
    processor: Any,
    *,
    i: int,
    extend_input_len_per_req: Sequence[int],
    extend_logprob_start_len_per_req: Sequence[int],
    logprob_pt: int,
    **others: Any,
) -> int:
    """Call ``apply`` with the place at which the log-probs of request ``i`` begin.

    Args:
        extend_input_len_per_req: tokens that the batch computed of each request.
        extend_logprob_start_len_per_req: how many of them, from the first on, have no log-prob.
        logprob_pt: where SGLang believes them to begin.
    """
    del logprob_pt
    lengths, starts = extend_input_len_per_req, extend_logprob_start_len_per_req
    return apply(
        processor,
        i=i,
        extend_input_len_per_req=lengths,
        extend_logprob_start_len_per_req=starts,
        logprob_pt=sum(lengths[:i]) - sum(starts[:i]),
        **others,
    )
