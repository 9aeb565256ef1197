"""Runs of tokens on their way to the model: prompts, forced tokens, replays.

A feed captures the slots it reads when it is made, so rows may be joined or closed before the model
runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from npr_megatron.engine.flow.flow import Stream
from npr_megatron.engine.flow.segment import Segment
from npr_megatron.engine.memory.pool import SlotArray, SlotPool
from npr_megatron.records.trajectory import BoolArray
from npr_megatron.topology.visibility import visible


class Labels(NamedTuple):
    """Parallel block and branch of tokens, as ``topology.visibility`` reads them."""

    block: npt.NDArray[np.int32]
    branch: npt.NDArray[np.int32]

    def first(self, num_tokens: int) -> Labels:
        """Return the labels of the first ``num_tokens`` tokens; no copy."""
        return Labels(self.block[:num_tokens], self.branch[:num_tokens])


@dataclass(slots=True, eq=False)
class Feed:
    """Tokens of one stream to run through the model, and what becomes of their logits.

    Example: ``[last sampled </guideline>, NL]`` with both logits scored, the branch headers with
        the last logit sampled, a prompt with neither.
    """

    token_ids: Sequence[int] | npt.NDArray[np.int32]
    position_ids: Sequence[int] | npt.NDArray[np.int32]
    slots: SlotArray
    """Where keys and values of these tokens go."""
    readable: SlotArray
    """Slots the last token reads; they end with ``slots``. The i-th token from the end reads i
    fewer.
    """
    labels: Labels | None = None
    """Of the tokens in ``readable``, where some of them are blind to each other."""
    scored: list[tuple[Segment, int]] = field(default_factory=list)
    """The i-th entry is the known token predicted by the logit of the i-th token fed."""
    sampled: Stream | None = None
    """The stream that takes a sample from the last logit."""

    @classmethod
    def of_tail(
        cls,
        segment: Segment,
        num_tokens: int,
        row: int,
        pool: SlotPool,
        sampled: Stream | None = None,
    ) -> Feed:
        """Return the feed of the last ``num_tokens`` of ``segment``."""
        start = len(segment.token_ids) - num_tokens
        slots = pool.append(row, num_tokens)
        return cls(
            token_ids=segment.token_ids[start:],
            position_ids=segment.position_ids[start:],
            slots=slots,
            readable=pool.read(row),
            scored=[(segment, index) for index in range(start + 1, start + num_tokens)],
            sampled=sampled,
        )

    @classmethod
    def of_tree(
        cls, streams: dict[str, npt.NDArray[Any]], slots: SlotArray, num_shared: int
    ) -> Feed:
        """Return the feed of a linearised tree behind ``num_shared`` tokens that are in the pool
        already.
        """
        return cls(
            token_ids=streams["token_ids"][num_shared:],
            position_ids=streams["position_ids"][num_shared:],
            slots=slots[num_shared:],
            readable=slots,
            labels=Labels(streams["block"], streams["branch"]),
        )

    def mask(self) -> BoolArray:
        """Return [tokens, readable], True where a token sees a slot."""
        count, length = len(self.token_ids), len(self.readable)
        start = length - count
        mask = np.arange(length) <= np.arange(start, length)[:, None]
        if self.labels is not None:
            block, branch = self.labels
            mask &= visible(block[start:, None], branch[start:, None], block, branch)
        return mask

    def take(self, num_tokens: int) -> tuple[Feed, Feed | None]:
        """Return the feed of the first ``num_tokens`` and that of the rest, None if there is none.

        Run in this order, in one pass or in two, they do the same as the whole.

        Args:
            num_tokens: at least 1.
        """
        rest = len(self.token_ids) - num_tokens
        if rest <= 0:
            return self, None
        end = len(self.readable) - rest
        head = Feed(
            token_ids=self.token_ids[:num_tokens],
            position_ids=self.position_ids[:num_tokens],
            slots=self.slots[:num_tokens],
            readable=self.readable[:end],
            labels=None if self.labels is None else self.labels.first(end),
            scored=self.scored[:num_tokens],
        )
        tail = Feed(
            token_ids=self.token_ids[num_tokens:],
            position_ids=self.position_ids[num_tokens:],
            slots=self.slots[num_tokens:],
            readable=self.readable,
            labels=self.labels,
            scored=self.scored[num_tokens:],
            sampled=self.sampled,
        )
        return head, tail
