"""Work that one rank does for all: its result, or its error, reaches every rank.

The others wait for as long as the work takes (a collective with the usual time limit would give up
on a long one); a rank that dies closes its connections, which ends the wait.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from npr_megatron.errors import EnvironmentFault, NprError

Result = TypeVar("Result")
_NO_DEADLINE = timedelta(days=3650)


class ToldElsewhere(NprError, RuntimeError):
    """What rank 0 has already said: other ranks end without saying it again."""


class FirstRank:
    """Rank 0, as seen by all. Build it on every rank at once, after the world has been joined."""

    def __init__(self) -> None:
        group = dist.new_group(backend="gloo", timeout=_NO_DEADLINE)
        assert isinstance(group, dist.ProcessGroup), "every rank is in it"
        self.group = group
        """All ranks, moving host memory, for as long as it takes."""

    def call(self, work: Callable[[], Result]) -> Result:
        """Return what ``work`` returns on rank 0 (anything picklable), on every rank. Collective.

        Raises:
            NprError: on rank 0 what ``work`` raised; ToldElsewhere with the same words on the
                others.
        """
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if dist.get_rank() == 0:
            try:
                outcome[0] = work()
            except Exception as error:  # noqa: BLE001 - whatever it was, the others must not wait
                failure = error
                outcome[1] = f"{type(error).__name__}: {error}"
        try:
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        except RuntimeError as error:
            raise EnvironmentFault(
                f"rank {dist.get_rank()} waited for rank 0, which is gone ({error}); what it said "
                "before stands in its output; start all ranks again"
            ) from error
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            raise ToldElsewhere(outcome[1])
        return outcome[0]
