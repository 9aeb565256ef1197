"""Whether an optimizer step may be taken: a pure decision, the same on every rank.

A step is skipped when its loss or gradient is not finite, or when its gradient spikes: the norm is
above ``TrainerConfig.spike_factor`` times the median norm of the steps taken before. Skipping costs
one batch; stepping would cost the run. Two things end it all the same: more skips in a row than
``max_skips_in_row``, and a step that is not finite before any was taken, where model or data are
broken and not one batch among many.

What is remembered travels with checkpoints, so a resumed run decides as the unbroken one.

Example::

    fault = guard.fault_of(loss, grad_norm)
    if not fault:
        guard = guard.after_step(grad_norm)     # and the step is taken
    elif not guard.is_at_end:
        guard = guard.after_skip()              # and it is not
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import Any

from npr_megatron.config.training import TrainerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What the steps of a training stage have shown so far."""

    limits: TrainerConfig
    norms: tuple[float, ...] = ()
    """Gradient norms of the last steps taken, the oldest first; ``spike_window`` at most."""
    skips_in_row: int = 0

    @classmethod
    def restored(cls, limits: TrainerConfig, remembered: dict[str, Any] | None) -> Guard:
        """Return the guard that :meth:`remembered` described; a fresh one of None."""
        if remembered is None:
            return cls(limits=limits)
        norms = tuple(float(norm) for norm in remembered["norms"])[-limits.spike_window :]
        return cls(limits=limits, norms=norms, skips_in_row=int(remembered["skips_in_row"]))

    def remembered(self) -> dict[str, Any]:
        """Return JSON values for a checkpoint."""
        return {"norms": list(self.norms), "skips_in_row": self.skips_in_row}

    def fault_of(self, loss: float, grad_norm: float) -> str:
        """Say what is wrong with a step, "" if nothing.

        Args:
            loss: the sum over the global batch.
            grad_norm: before clipping; not looked at where ``loss`` is not finite.
        """
        if not math.isfinite(loss):
            return f"a step needs a finite loss, its sum is {loss}"
        if not math.isfinite(grad_norm):
            return f"a step needs a finite gradient, its norm is {grad_norm}"
        factor, window = self.limits.spike_factor, self.limits.spike_window
        if factor is None or len(self.norms) < window:
            return ""
        usual = statistics.median(self.norms)
        if grad_norm <= factor * usual:
            return ""
        return (
            f"the gradient's norm must stay within trainer.spike_factor {factor:g} times "
            f"{usual:.3g}, the median of the last {window} steps, and is {grad_norm:.3g}"
        )

    @property
    def is_at_end(self) -> bool:
        """Whether the next step that cannot be taken ends the run."""
        return not self.norms or self.skips_in_row >= self.limits.max_skips_in_row

    def after_step(self, grad_norm: float) -> Guard:
        """Return what is known after a step was taken."""
        norms = (*self.norms, grad_norm)[-self.limits.spike_window :]
        return dataclasses.replace(self, norms=norms, skips_in_row=0)

    def after_skip(self) -> Guard:
        """Return what is known after a step was skipped."""
        return dataclasses.replace(self, skips_in_row=self.skips_in_row + 1)

    @property
    def why_it_ends(self) -> str:
        """Say why a step that cannot be taken ends the run and is not just skipped."""
        if not self.norms:
            return "no step of this stage was taken yet, so it is no single bad batch"
        count = self.skips_in_row
        before = f"and the {count} before it were skipped" if count else "and none is skipped"
        return f"{before} (trainer.max_skips_in_row is {self.limits.max_skips_in_row})"
