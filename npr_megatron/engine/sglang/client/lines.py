"""Streams as SGLang decodes them: ahead of their flow by what was not accepted yet."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from npr_megatron.engine.flow.flow import Stream


@dataclass(slots=True)
class Scores:
    """Log-probs of known tokens that a stage computed."""

    logprobs: list[float]
    version: int

    @property
    def is_finite(self) -> bool:
        """Whether the model gave a distribution everywhere."""
        return math.isfinite(sum(self.logprobs))


Received = deque[tuple[int, float, int]]
"""token, log-prob and weight version of what was sampled and not accepted yet"""


@dataclass(slots=True, eq=False)
class Line:
    """A stream and what was received of it."""

    branch: int
    """0 for the trunk."""
    header: tuple[int, ...] = ()
    """Forced tokens in front, as long as the flow has not placed them."""
    stream: Stream | None = None
    """None as long as the flow has not placed the header."""
    received: Received = field(default_factory=deque)
    header_scores: Scores | None = None
    stage: int | None = None
    """Number of the stage under way."""
    num_in_stage: int = 0
    """Tokens that the latest stage has brought."""
    has_paused: bool = False
    """Whether a stage ended without closing the stream: it goes on when the flow asks for more."""
    is_closed: bool = False
    """Whether what was received ends the stream."""
    is_forced: bool = False
    """Whether it is closed by a ``</step>`` that takes the place of the last one received."""
    is_broken: bool = False
    """Whether the last token received ends the trajectory."""
    seal_scores: Scores | None = None
    is_sealed: bool = False
    """Whether all its keys and values are in the cache."""

    @property
    def own_ids(self) -> list[int]:
        """All tokens of the stream's segment, those that were not accepted included."""
        known = self.header if self.stream is None else self.stream.segment.token_ids
        return [*known, *(token_id for token_id, _, _ in self.received)]

    @property
    def is_ready(self) -> bool:
        """Whether the next token can be accepted."""
        is_last = len(self.received) == 1
        return bool(self.received) and not (self.is_forced and is_last and not self.seal_scores)
