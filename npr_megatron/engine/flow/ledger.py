"""The exact budget of one trajectory: three numbers that are never estimated.

    total           generated tokens over all branches, forced ones included
    critical path   generated positions: the longest path through forks and joins
    resident KV     tokens whose keys and values are needed: all but the last of each open stream

The released engine charges (number of plans) x (length) in advance, which strands runs in their
first block; here a token is charged when it is placed. A forced run (a separator, a set of headers)
is charged as a whole or not at all.
"""

from __future__ import annotations

from typing import NamedTuple

from npr_megatron.records.trajectory import FinishReason


class Usage(NamedTuple):
    """What a trajectory has taken so far [tokens]."""

    total: int
    critical_path: int
    resident_kv: int
    """The prompt's included, which rollouts of one prompt hold together."""


class Ledger:
    """What one trajectory has spent and may still spend.

    Args:
        prompt_length: tokens that were given; their positions are free.
        max_new_tokens: limit of the total.
        max_critical_path: limit of the critical path.
    """

    __slots__ = ("_end_position", "_prompt_length", "max_new_tokens", "total")

    def __init__(self, prompt_length: int, max_new_tokens: int, max_critical_path: int) -> None:
        self._prompt_length = prompt_length
        self._end_position = prompt_length + max_critical_path
        self.max_new_tokens = max_new_tokens
        self.total = 0
        """Tokens spent."""

    def verdict(self, num_tokens: int, end_position: int) -> FinishReason | None:
        """Return why ``num_tokens`` more reaching up to ``end_position`` (exclusive) do not fit, or
        None.
        """
        if self.total + num_tokens > self.max_new_tokens:
            return FinishReason.LENGTH
        if end_position > self._end_position:
            return FinishReason.CRITICAL_PATH
        return None
