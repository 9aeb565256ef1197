"""What is different between two plans, for people who changed the membership or a layout."""

from __future__ import annotations

from dataclasses import dataclass

from npr_megatron.weights.box import Box
from npr_megatron.weights.plans.copies import Copy
from npr_megatron.weights.plans.plan import TransferPlan


@dataclass(frozen=True, slots=True)
class PlanChange:
    """A box of a target storage that is filled otherwise than before."""

    is_share: bool
    before: Copy | None
    """None: no copy filled exactly this box."""
    after: Copy | None
    """None: no copy fills exactly this box any more."""

    def __str__(self) -> str:
        copy = self.after or self.before
        assert copy is not None
        here = f"target rank {copy.target_rank} {copy.target_storage}{_slices(copy.target_box)}"
        verb = "share" if self.is_share else "copy"
        if self.before is None:
            return f"+ {verb} to {here} from {self._source(copy)}"
        if self.after is None:
            return f"- {verb} to {here} from {self._source(copy)}"
        return f"~ {verb} to {here} from {self._source(copy)}, was from {self._source(self.before)}"

    def _source(self, copy: Copy) -> str:
        side = "target" if self.is_share else "source"
        return f"{side} rank {copy.source_rank} {copy.source_storage}{_slices(copy.source_box)}"


def diff_plans(old: TransferPlan, new: TransferPlan) -> tuple[PlanChange, ...]:
    """Return all changes, by target rank and storage; none if both move the same.

    Example:
        After rank 3 left, boxes that it gave read ``~ copy to ... from source rank 1 ..., was from
        source rank 3 ...``.
    """
    changes: list[PlanChange] = []
    for is_share, before, after in (
        (False, old.copies, new.copies),
        (True, old.shares, new.shares),
    ):
        filled_before = {_filled(copy): copy for copy in before}
        filled_after = {_filled(copy): copy for copy in after}
        for key in sorted(filled_before.keys() | filled_after.keys()):
            one, other = filled_before.get(key), filled_after.get(key)
            if one != other:
                changes.append(PlanChange(is_share, one, other))
    return tuple(changes)


def _filled(copy: Copy) -> tuple[int, str, Box]:
    return copy.target_rank, copy.target_storage, copy.target_box


def _slices(box: Box) -> str:
    axes = zip(box.start, box.stop, strict=True)
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in axes) + "]"
