"""What the loops need from the trainer and the fleet; the loops never see Ray.

``pipeline.run`` hands them the Ray ones; the same loops run over anything with these methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from npr_megatron.config.training import OptimizerConfig
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.sample import FloatArray
from npr_megatron.records.trajectory import Trajectory
from npr_megatron.train.step import StepBatch, StepResult
from npr_megatron.weights.publication import Publication


class Learner(Protocol):
    """Trainer ranks that learn: all of them acting as one, or each making the same calls."""

    def load_hf(self, path: Path) -> None: ...
    def begin_stage(self, optimizer: OptimizerConfig, num_steps: int) -> None: ...
    def train_step(self, batch: StepBatch) -> StepResult: ...
    def score(self, batch: StepBatch) -> list[FloatArray]: ...
    def save(self, path: Path, progress: dict[str, Any]) -> None: ...
    def load(self, path: Path) -> dict[str, Any]: ...
    def export_hf(self, path: Path, source_folder: Path) -> None: ...


class Trainer(Learner, Protocol):
    """All trainer ranks, acting as one, that hand their weights to engines."""

    def publish(self, version: int) -> Publication: ...


class SampleSource(Protocol):
    """The fleet of engines, acting as one."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        on_finish: Callable[[Trajectory], None] | None = None,
    ) -> list[Trajectory]: ...

    def push(self, publication: Publication) -> None: ...
