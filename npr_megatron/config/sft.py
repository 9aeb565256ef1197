"""SftConfig: the whole of a run file of ``npr sft``, supervised training on files of one's own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from npr_megatron.config.base import Section
from npr_megatron.config.checkpoint import CheckpointKeeping
from npr_megatron.config.run import ModelSection, RunSection
from npr_megatron.config.training import OptimizerConfig, ParallelConfig, TrainerConfig


class DataSection(Section):
    """Files of rows: .jsonl, .parquet, or folders written by datasets.save_to_disk."""

    train: tuple[str, ...] = Field(min_length=1)
    """Paths, or patterns with ``*``."""
    validation: tuple[str, ...] = ()
    """Held-out files, read like ``train``."""
    validation_frac: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows held out instead; equal samples stay together."""
    over_long: Literal["refuse", "skip"] = "refuse"
    """What to do with samples longer than trainer.row_tokens; those skipped are listed."""
    malformed: Literal["refuse", "skip"] = "refuse"
    """What to do with responses whose tags break the grammar; those skipped are listed."""


class SftSection(Section):
    """How long, how much at once, how often to look."""

    num_epochs: PositiveInt | None = None
    """Passes over the training rows; either this or ``num_steps``."""
    num_steps: PositiveInt | None = None
    """Optimizer steps; rows come again as often as it takes."""
    rows_per_step: PositiveInt
    """Packed rows of one optimizer step: dp_size * rows_per_microbatch * microbatches."""
    optimizer: OptimizerConfig
    validate_every_steps: PositiveInt = 100
    checkpoint_every_steps: PositiveInt = 100
    show_rows: NonNegativeInt = 2
    """Packed rows of the first step to draw, with what is learnt in colour."""
    peak_tflops: PositiveFloat | None = None
    """Peak of one device for MFU [TFLOP/s, dense]; None: that of a known GPU."""


class SftConfig(Section):
    """Everything ``npr sft`` needs; see ``examples/sft/run.toml``."""

    run: RunSection
    model: ModelSection
    data: DataSection
    parallel: ParallelConfig = ParallelConfig()
    trainer: TrainerConfig = TrainerConfig()
    checkpoint: CheckpointKeeping = CheckpointKeeping()
    sft: SftSection
