"""The eight tags and the few other tokens the grammar knows, as ids."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Tag(StrEnum):
    """The eight tags, each one token."""

    GUIDELINE_OPEN = "<guideline>"
    GUIDELINE_CLOSE = "</guideline>"
    PLAN_OPEN = "<plan>"
    PLAN_CLOSE = "</plan>"
    STEP_OPEN = "<step>"
    STEP_CLOSE = "</step>"
    TAKEAWAY_OPEN = "<takeaway>"
    TAKEAWAY_CLOSE = "</takeaway>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The ids the grammar needs; everything else is text. Picklable, hashable, no tokenizer inside.

    Built once from a tokenizer by ``data.tokenizer.vocabulary_of``, which proves that each tag is
    one token.
    """

    guideline_open: int
    guideline_close: int
    plan_open: int
    plan_close: int
    step_open: int
    step_close: int
    takeaway_open: int
    takeaway_close: int
    newline: int
    """Id of a single newline."""
    eos: int
    index_ids: tuple[tuple[int, ...], ...]
    """``index_ids[i - 1]`` spells ``i:``; its length is the largest legal number of plans."""
    blank_ids: frozenset[int] = frozenset()
    """Ids that are only white space (the newline included); text made only of these is empty."""

    @property
    def max_plans(self) -> int:
        """Largest legal number of plans per guideline."""
        return len(self.index_ids)

    @property
    def tags(self) -> dict[int, Tag]:
        """Id of each tag to the tag, in the order of :class:`Tag`."""
        ids = (
            self.guideline_open,
            self.guideline_close,
            self.plan_open,
            self.plan_close,
            self.step_open,
            self.step_close,
            self.takeaway_open,
            self.takeaway_close,
        )
        return dict(zip(ids, Tag, strict=True))

    def step_header(self, index: int) -> tuple[int, ...]:
        """Return the forced opening of branch ``index`` (1-based), ``<step>`` newline ``i:``."""
        return (self.step_open, self.newline, *self.index_ids[index - 1])

    @property
    def takeaway_header(self) -> tuple[int, ...]:
        """The forced tokens after a join: ``<takeaway>`` newline."""
        return (self.takeaway_open, self.newline)
