"""Pieces of a trajectory: segments that grow on one stream, and feeds that carry some of their
tokens to the model.

Segments in order of creation, laid one after another, are the linear form of a trajectory: trunk,
branch 1, branch 2, ..., trunk. A feed captures the slots it reads when it is made, so rows may be
joined or closed before the model runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from npr_megatron.engine.pool import SlotArray, SlotPool
from npr_megatron.topology.visibility import dense_mask

if TYPE_CHECKING:
    from npr_megatron.engine.flow import Stream


class Segment:
    """Consecutive tokens of one stream: aligned lists, grown token by token."""

    __slots__ = (
        "block",
        "branch",
        "forced",
        "logprobs",
        "position_ids",
        "token_ids",
        "weight_versions",
    )

    def __init__(self, block: int, branch: int) -> None:
        self.block = block
        self.branch = branch
        self.token_ids: list[int] = []
        self.position_ids: list[int] = []
        self.forced: list[bool] = []
        self.logprobs: list[float] = []
        self.weight_versions: list[int] = []

    @classmethod
    def of_prompt(cls, prompt_ids: Sequence[int]) -> Segment:
        """Return the trunk's first segment: the prompt, given and without log-probs."""
        segment = cls(0, 0)
        length = len(prompt_ids)
        segment.token_ids = list(prompt_ids)
        segment.position_ids = list(range(length))
        segment.forced = [True] * length
        segment.logprobs = [0.0] * length
        segment.weight_versions = [-1] * length
        return segment

    def append(
        self, token_id: int, position: int, forced: bool, logprob: float, version: int
    ) -> None:
        """Add one token."""
        self.token_ids.append(token_id)
        self.position_ids.append(position)
        self.forced.append(forced)
        self.logprobs.append(logprob)
        self.weight_versions.append(version)


def linearise(segments: Sequence[Segment]) -> dict[str, npt.NDArray[Any]]:
    """Return the aligned streams of a trajectory (the fields of ``records.Trajectory`` of length
    T).
    """
    lengths = [len(segment.token_ids) for segment in segments]
    return {
        "token_ids": _chain([segment.token_ids for segment in segments], np.int32),
        "position_ids": _chain([segment.position_ids for segment in segments], np.int32),
        "block": np.repeat(np.array([s.block for s in segments], np.int32), lengths),
        "branch": np.repeat(np.array([s.branch for s in segments], np.int32), lengths),
        "forced": _chain([segment.forced for segment in segments], np.bool_),
        "logprobs": _chain([segment.logprobs for segment in segments], np.float32),
        "weight_versions": _chain([segment.weight_versions for segment in segments], np.int32),
    }


def _chain(lists: Sequence[Sequence[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.array(list(itertools.chain.from_iterable(lists)), dtype=dtype)


@dataclass(slots=True, eq=False)
class Feed:
    """Tokens of one stream to run through the model, and what becomes of their logits.

    Example: ``[last sampled </guideline>, NL]`` with both logits scored, the branch headers with
        the last logit
    sampled, a prompt with neither.
    """

    token_ids: Sequence[int] | npt.NDArray[np.int32]
    position_ids: Sequence[int] | npt.NDArray[np.int32]
    slots: SlotArray
    """Where keys and values of these tokens go."""
    readable: SlotArray
    """Slots the last token reads; they end with ``slots``. The i-th token from the end reads i
    fewer.
    """
    attention_mask: npt.NDArray[np.bool_] | None = None
    """[tokens, readable] instead of the causal rule."""
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
    def of_prefix(cls, token_ids: Sequence[int], slots: SlotArray) -> Feed:
        """Return the feed of the first tokens of a prompt."""
        return cls(token_ids, range(len(token_ids)), slots, slots)

    @classmethod
    def of_tree(
        cls, streams: dict[str, npt.NDArray[Any]], slots: SlotArray, num_shared: int
    ) -> Feed:
        """Return the feed of a linearised tree behind ``num_shared`` tokens that are in the pool
        already.
        """
        mask = dense_mask(np.zeros_like(streams["block"]), streams["block"], streams["branch"])
        return cls(
            token_ids=streams["token_ids"][num_shared:].tolist(),
            position_ids=streams["position_ids"][num_shared:].tolist(),
            slots=slots[num_shared:],
            readable=slots,
            attention_mask=mask[num_shared:],
        )

    def split(self, max_tokens: int) -> list[Feed]:
        """Return feeds of at most ``max_tokens`` that, run in order, do the same; for feeds without
        logits.
        """
        num_tokens, length = len(self.token_ids), len(self.readable)
        if num_tokens <= max_tokens:
            return [self]
        pieces: list[Feed] = []
        for start in range(0, num_tokens, max_tokens):
            stop = min(start + max_tokens, num_tokens)
            end = length - num_tokens + stop
            mask = self.attention_mask
            pieces.append(
                Feed(
                    token_ids=self.token_ids[start:stop],
                    position_ids=self.position_ids[start:stop],
                    slots=self.slots[start:stop],
                    readable=self.readable[:end],
                    attention_mask=None if mask is None else mask[start:stop, :end],
                )
            )
        return pieces
