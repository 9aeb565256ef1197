"""The weights an engine computes with, and the shadow copy in which the next ones are prepared.

Live storages are written in place, between two steps, and only after everything that is to be
written was checked: a refused version leaves them untouched. The shadow may be filled by another
thread while steps run, since no step reads it. What the change means for trajectories under way is
the engine's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from npr_megatron.engine.intake import unfit_numbers, weight_problems
from npr_megatron.errors import DivergenceError, LayoutError, StaleWeightsError


def _alone(version: int) -> None:
    """Agree to ``version``: there is nobody else to ask."""


class LiveWeights:
    """Live storages, their version, and their shadow.

    Args:
        agree: called with a version that this rank is about to take over; raises, and so keeps it
            from doing so, if another rank of the same engine cannot.
    """

    def __init__(
        self, storages: Mapping[str, Tensor], agree: Callable[[int], None] = _alone
    ) -> None:
        self._agree = agree
        self.storages = dict(storages)
        """By name; never replaced by other tensors."""
        self.version = -1
        """-1 until some are loaded."""
        self._shadow: dict[str, Tensor] = {}
        self._is_sealed = False

    def load(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy ``weights`` over the live ones, whatever their version.

        Raises:
            LayoutError: a storage is missing, unknown or of another shape.
            DivergenceError: a storage holds NaN or infinity.
        """
        if problems := weight_problems(weights, self.storages):
            raise LayoutError("\n".join(problems))
        _require_finite(weights, f"version {version} was to be loaded")
        self._agree(version)
        self._copy(weights, version)

    def staging(self) -> dict[str, Tensor]:
        """Return the shadow, to be filled anew; allocated once."""
        self._is_sealed = False
        if not self._shadow:
            self._shadow = {name: torch.zeros_like(x) for name, x in self.storages.items()}
        return self._shadow

    def seal(self) -> None:
        """Check the filled shadow, so that :meth:`commit` need not while nothing decodes.

        Raises:
            DivergenceError: a storage holds NaN or infinity.
        """
        _require_finite(self._shadow, "weights were staged")
        self._is_sealed = True

    def commit(self, version: int) -> None:
        """Copy the shadow over the live storages.

        Raises:
            StaleWeightsError: nothing was staged, or ``version`` is not newer than the live one.
            DivergenceError: the shadow holds NaN or infinity.
        """
        if not self._shadow:
            raise StaleWeightsError(
                f"version {version} was to be committed, but nothing is staged; fill staging()"
            )
        if version <= self.version:
            raise StaleWeightsError(
                f"version {version} was to be committed over version {self.version}; "
                "publish versions in increasing order"
            )
        if not self._is_sealed:
            self.seal()
        self._agree(version)
        self.take(version)

    def take(self, version: int) -> None:
        """Copy the sealed shadow over the live storages, whatever their version."""
        self._copy(self._shadow, version)

    @torch.inference_mode()
    def _copy(self, weights: Mapping[str, Tensor], version: int) -> None:
        for name, live in self.storages.items():
            live.copy_(weights[name])
        self.version = version


def _require_finite(weights: Mapping[str, Tensor], what: str) -> None:
    if problems := unfit_numbers(weights):
        raise DivergenceError(
            f"{what}, every number must be finite; the live weights are as before, check the "
            "trainer:\n" + "\n".join(problems)
        )
