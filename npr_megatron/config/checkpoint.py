"""How checkpoints of a trainer are written and how many are kept, wherever they are taken."""

from __future__ import annotations

from pydantic import PositiveInt

from npr_megatron.config.base import Section


class CheckpointKeeping(Section):
    """The trainer's state on disk; a run's folder of checkpoints is removed when it has its
    model."""

    keep_last: PositiveInt = 2
    """Whole checkpoints to keep; with two or more a damaged one has one to go back to."""
    in_background: bool = True
    """Training goes on while a checkpoint is written; the next one waits for it."""
