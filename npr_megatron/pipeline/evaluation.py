"""Evaluation of the model a stage produced: quality over the fleet, speed in this process."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

from npr_megatron.config.stages import StageName
from npr_megatron.data.sources import ProblemSource
from npr_megatron.evaluation.metrics import Evaluation, evaluate
from npr_megatron.evaluation.speed import Speed, measure_speed
from npr_megatron.pipeline.context import RunContext
from npr_megatron.records.trajectory import DecodeMode
from npr_megatron.rewards.combine import score_npr

# Below this share of native trajectories a speed ratio says nothing about parallel decoding.
_MIN_TRIGGER_RATE = 0.5


def evaluate_stage(
    context: RunContext, problems: ProblemSource, stage: StageName, model: Path
) -> None:
    """Measure what the fleet serves, both ways, and log one line per decode mode."""
    sequential = _quality(context, problems, stage, DecodeMode.SEQUENTIAL)
    native = _quality(context, problems, stage, DecodeMode.PARALLEL)
    speed = None
    if native.trigger_rate >= _MIN_TRIGGER_RATE and context.config.evaluation.speed_problems:
        speed = _speed(context, problems, stage, model)
    for result, timed in ((sequential, None), (native, speed)):
        line = {"stage": stage, **result.to_json()}
        if timed is not None:
            line |= {**dataclasses.asdict(timed), "speedup": timed.speedup}
        context.folder.append(context.folder.evaluations, line)


def _quality(
    context: RunContext,
    problems: ProblemSource,
    stage: StageName,
    mode: DecodeMode,
) -> Evaluation:
    settings = context.config.evaluation
    chosen = problems.held_out(settings.num_problems)
    requests = context.requests(
        f"evaluation/{stage}/{mode}", chosen, mode, range(settings.rollouts_per_problem)
    )
    trajectories = context.decode(requests)
    if mode is DecodeMode.PARALLEL:
        context.keep_sample(
            stage,
            0,
            trajectories[0],
            score_npr(trajectories[0], chosen[0].answer, context.reader).reward,
        )
    return evaluate(trajectories, chosen, context.reader, context.is_faithful)


def _speed(context: RunContext, problems: ProblemSource, stage: StageName, model: Path) -> Speed:
    from npr_megatron.pipeline.local_engine import open_engine

    chosen = problems.held_out(context.config.evaluation.speed_problems)
    native, sequential = (
        context.requests(f"speed/{stage}", chosen, mode)
        for mode in (DecodeMode.PARALLEL, DecodeMode.SEQUENTIAL)
    )
    pairs = list(zip(native, sequential, strict=True))
    config, vocabulary = context.config.engine, context.tokenizer.vocabulary
    with closing(open_engine(model, config, vocabulary)) as engine:
        return measure_speed(engine, pairs)
