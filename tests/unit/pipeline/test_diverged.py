"""Weights that give no distribution stop a run wherever it samples; an engine alone serves on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.loader import load_run
from npr_megatron.config.run import SumsTask
from npr_megatron.config.training import LossConfig
from npr_megatron.data.prompts import PromptBuilder
from npr_megatron.data.sums import SumsSource
from npr_megatron.data.sums_tokenizer import build_sums_tokenizer
from npr_megatron.data.tokenizer import load_tokenizer
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.interface import Engine
from npr_megatron.errors import DivergenceError
from npr_megatron.observability.metrics import MetricsLog
from npr_megatron.pipeline.context import RunContext
from npr_megatron.pipeline.evaluation import evaluate_stage
from npr_megatron.pipeline.folder import RunFolder
from npr_megatron.pipeline.rejection import run_rejection
from npr_megatron.pipeline.rl import RlRecipe, rl_step
from npr_megatron.records.trajectory import DecodeMode, FinishReason
from npr_megatron.report.live import LiveView
from npr_megatron.rewards.combine import score_zero
from npr_megatron.rewards.reading import Reader
from npr_megatron.train.advantages import dapo_advantages
from tests.engines import TINY, random_weights

QUICKSTART = Path(__file__).parents[3] / "examples/quickstart/run.toml"
SMALL_RUN = [
    "zero.prompts_per_step=2",
    "zero.rollouts_per_prompt=2",
    "sample.prompts_per_round=2",
    "evaluation.num_problems=2",
    "sampling.max_new_tokens=4",
]


def source(context: RunContext) -> SumsSource:
    assert isinstance(context.config.task, SumsTask)
    return SumsSource(context.config.task, context.config.run.seed)


def train(context: RunContext) -> None:
    recipe = RlRecipe(
        stage="zero",
        settings=context.config.zero,
        mode=DecodeMode.SEQUENTIAL,
        loss=LossConfig(kind="dapo"),
        score=lambda trajectory, problem: score_zero(trajectory, problem.answer, context.reader),
        advantages=dapo_advantages,
    )
    rl_step(context, recipe, source(context), 1)


def select(context: RunContext) -> None:
    run_rejection(context, source(context), 1)


def measure(context: RunContext) -> None:
    evaluate_stage(context, source(context), "zero", context.folder.hf("zero"))


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    """A run whose fleet is one engine that holds diverged weights; no trainer is ever reached."""
    config = load_run(QUICKSTART, [f'run.output_dir="{tmp_path / "run"}"', *SMALL_RUN])
    folder = RunFolder.of(config)
    folder.open(config, fresh=False)
    build_sums_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    model = TINY.model_copy(update={"vocab_size": 128})
    engine = EmbeddedEngine(model, EngineConfig(), tokenizer.vocabulary)
    weights = random_weights(model, 0)
    weights["layers.1.down_proj.weight"][:] = 1e38
    engine.load(weights, version=9)
    return RunContext(
        config=config,
        folder=folder,
        trainer=cast("Any", None),
        fleet=cast("Any", engine),
        tokenizer=tokenizer,
        tokenizer_folder=tmp_path / "tokenizer",
        prompts=PromptBuilder(tokenizer),
        reader=Reader(tokenizer.decode, tokenizer.vocabulary),
        is_faithful=None,
        metrics=MetricsLog(folder.metrics),
        view=LiveView(Console(quiet=True)),
    )


@pytest.mark.parametrize("stage", [train, select, measure])
def test_no_stage_learns_from_or_measures_weights_without_a_distribution(
    context: RunContext, stage: Callable[[RunContext], None]
) -> None:
    with pytest.raises(DivergenceError, match=r"got no distribution.*weight version 9"):
        stage(context)
    for written in (context.folder.metrics, context.folder.evaluations):
        assert not written.exists() or not written.read_text()


def test_the_same_requests_pass_under_sound_weights_and_fail_alone_in_the_engine(
    context: RunContext,
) -> None:
    problems = source(context).held_out(2)
    requests = context.requests("test", problems, DecodeMode.SEQUENTIAL)
    failed = context.fleet.generate(requests)
    assert {trajectory.finish for trajectory in failed} == {FinishReason.FAILED}
    engine = cast("Engine", context.fleet)
    engine.load(random_weights(TINY.model_copy(update={"vocab_size": 128}), 0), version=10)
    passed = context.decode(requests)
    assert all(t.finish.is_of_policy and t.num_tokens for t in passed)
    assert all(torch.isfinite(torch.from_numpy(t.logprobs.copy())).all() for t in passed)
