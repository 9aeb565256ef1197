"""RunConfig: the whole of a run file."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from npr_megatron.config.base import Section
from npr_megatron.config.engine import ClusterConfig, EngineConfig, FleetConfig
from npr_megatron.config.model import InitConfig, ModelConfig
from npr_megatron.config.stages import (
    BetaStage,
    CheckpointConfig,
    EvaluationConfig,
    NprStage,
    RlStage,
    SampleStage,
    SamplingConfig,
    SeedStage,
)
from npr_megatron.config.training import ParallelConfig, TrainerConfig


class RunSection(Section):
    """Name, place and seed."""

    name: str
    output_dir: str = "runs"
    """Results go to ``<output_dir>/<name>-seed<seed>``."""
    seed: NonNegativeInt = 0


class ModelSection(Section):
    """The model every stage starts from: an HF folder, or a new one described here."""

    path: str | None = None
    """HF folder (config.json, safetensors, tokenizer). With it, ``architecture`` must be absent."""
    architecture: ModelConfig | None = None
    init: InitConfig = InitConfig()


class SumsTask(Section):
    """Multi-part sums, generated (``data.sums``)."""

    kind: Literal["sums"]
    min_parts: PositiveInt = 3
    max_parts: int = Field(default=5, ge=1, le=9)
    addends: int = Field(default=3, ge=2)
    """Addends per part."""
    min_addend: NonNegativeInt = 1
    max_addend: PositiveInt = 9


class PromptFileTask(Section):
    """Problems from JSONL files, one ``{"id", "question", "answer"}`` a line."""

    kind: Literal["jsonl"]
    train_path: str
    test_path: str


class RunConfig(Section):
    """Everything a run needs; see ``examples/quickstart/run.toml``."""

    run: RunSection
    model: ModelSection
    task: SumsTask | PromptFileTask = Field(discriminator="kind")
    parallel: ParallelConfig = ParallelConfig()
    trainer: TrainerConfig = TrainerConfig()
    engine: EngineConfig = EngineConfig()
    fleet: FleetConfig = FleetConfig()
    cluster: ClusterConfig = ClusterConfig()
    sampling: SamplingConfig = SamplingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed_stage: SeedStage | None = None
    zero: RlStage
    sample: SampleStage
    beta: BetaStage
    npr: NprStage
