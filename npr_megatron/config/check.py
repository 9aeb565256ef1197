"""Rules that join sections of a run: pure, and every problem at once.

A sentence has three parts: the fields, what they are against what they must be, what to change.
Facts about the machine (GPUs, ports, memory) are not judged here; files only by
:func:`check_files`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from npr_megatron.config.engine_check import device_of, engine_problems, seat_problems
from npr_megatron.config.families import model_problems
from npr_megatron.config.hf_architecture import read_trainable_architecture
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.parallel_check import parallel_problems
from npr_megatron.config.run import PromptFileTask, RunConfig, SumsTask
from npr_megatron.config.stages import SftPhase
from npr_megatron.config.training import OptimizerConfig
from npr_megatron.errors import InputError

MIN_BF16_GAP = 0.01
"""Two kernels that compute the same in bf16 differ by about this much in log-probs."""


def check_run(config: RunConfig, architecture: ModelConfig | None = None) -> list[str]:
    """Return every problem between the sections of ``config``; empty when it can run.

    Args:
        config: a run whose single fields are valid.
        architecture: the model behind ``model.path``; without it the rules about its shape are
            skipped.
    """
    model = config.model.architecture or architecture
    problems = [*_start(config), *_task(config), *_budgets(config), *_precision(config)]
    if model is not None:
        problems += [*model_problems(model), *_positions(config, model)]
    problems += parallel_problems(config.parallel, config.trainer, model)
    problems += engine_problems(config.engine, model, device_of(config.cluster))
    problems += seat_problems(config.engine, config.cluster)
    return [*problems, *_stages(config), *_cluster(config)]


def check_files(config: RunConfig) -> tuple[ModelConfig | None, list[str]]:
    """Return the architecture behind ``model.path`` and the problems with files the run names."""
    problems: list[str] = []
    architecture = None
    if config.model.path is not None:
        try:
            architecture = read_trainable_architecture(config.model.path)
        except InputError as error:
            problems.append(f"model.path: {error}")
    if isinstance(config.task, PromptFileTask):
        paths = {"train_path": config.task.train_path, "test_path": config.task.test_path}
        for name, path in paths.items():
            if problem := _prompt_file_problem(Path(path)):
                problems.append(f"task.{name}: {problem}")
    return architecture, problems


def check_all(config: RunConfig) -> list[str]:
    """Return the problems with files and between sections, in that order."""
    architecture, problems = check_files(config)
    return [*problems, *check_run(config, architecture)]


def name_problems(name: str) -> Iterator[str]:
    """Yield what keeps a run from being called ``name``."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        yield (
            f"run.name {name!r} names a folder; use letters, digits, '.', '-' and '_', "
            "the first one a letter or digit"
        )


def _start(config: RunConfig) -> Iterator[str]:
    yield from name_problems(config.run.name)
    has_path, is_new = config.model.path is not None, config.model.architecture is not None
    if has_path and is_new:
        yield (
            "model.path and [model.architecture] are both set; keep the path, or describe a new "
            "model"
        )
    if not has_path and not is_new:
        yield (
            "[model] names no model; set model.path to an HF folder, "
            "or describe a new one in [model.architecture]"
        )
    if is_new and config.seed_stage is None:
        yield (
            "[model.architecture] describes an untrained model and [seed_stage] is missing; "
            "add [seed_stage], or start from model.path"
        )
    if has_path and config.seed_stage is not None:
        yield "model.path names a trained model and [seed_stage] is set; remove one of them"
    if is_new and not isinstance(config.task, SumsTask):
        yield (
            f'a new model knows the sums alphabet only and task.kind is "{config.task.kind}"; '
            'set task.kind = "sums" or model.path'
        )


def _task(config: RunConfig) -> Iterator[str]:
    task = config.task
    if not isinstance(task, SumsTask):
        return
    if task.min_parts > task.max_parts:
        yield (
            f"task.min_parts {task.min_parts} is above task.max_parts {task.max_parts}; swap or "
            "raise"
        )
    if task.min_addend > task.max_addend:
        yield (
            f"task.min_addend {task.min_addend} is above task.max_addend {task.max_addend}; "
            "lower min_addend"
        )
    if task.max_parts > config.engine.max_plans:
        yield (
            f"task.max_parts {task.max_parts} needs as many branches and engine.max_plans is "
            f"{config.engine.max_plans}; set engine.max_plans = {task.max_parts}"
        )


def _budgets(config: RunConfig) -> Iterator[str]:
    budget, path = config.sampling.max_new_tokens, config.sampling.max_critical_path
    if path > budget:
        yield (
            f"sampling.max_critical_path {path} is longer than all tokens together, "
            f"sampling.max_new_tokens {budget}; lower it to {budget} or less"
        )
    if budget >= config.trainer.row_tokens:
        yield (
            f"sampling.max_new_tokens {budget} and a prompt do not fit trainer.row_tokens "
            f"{config.trainer.row_tokens}; set row_tokens above {budget} plus the longest prompt"
        )
    if budget >= config.engine.num_kv_slots:
        yield (
            f"sampling.max_new_tokens {budget} and a prompt do not fit engine.num_kv_slots "
            f"{config.engine.num_kv_slots}; set num_kv_slots to several times {budget}"
        )
    if config.sampling.temperature == 0:
        yield (
            "sampling.temperature 0 makes all rollouts of a prompt equal, so nothing is learnt "
            "from them; "
            "set it to 1.0"
        )


def _precision(config: RunConfig) -> Iterator[str]:
    trainer, engine = config.trainer, config.engine
    if trainer.dtype != engine.dtype:
        yield (
            f"trainer.dtype {trainer.dtype} and engine.dtype {engine.dtype} differ, and a push "
            "copies "
            "bits; set both alike"
        )
    if engine.weights == "fp8":
        yield (
            'engine.weights is "fp8" and a push publishes weights as they are trained; set '
            '"as_trained" in a run, and serve its result in FP8'
        )
    if trainer.dtype == "bf16" and config.cluster.gpus_per_trainer == 0:
        yield (
            'trainer.dtype "bf16" needs GPUs and cluster.gpus_per_trainer is 0; '
            'set gpus_per_trainer = 1, or dtype = "fp32"'
        )
    if "bf16" in (trainer.dtype, engine.dtype) and trainer.max_logprob_gap < MIN_BF16_GAP:
        yield (
            f"trainer.max_logprob_gap {trainer.max_logprob_gap:g} is below the rounding of bf16 "
            f"({MIN_BF16_GAP:g}); raise it, or use fp32"
        )


def _positions(config: RunConfig, model: ModelConfig) -> Iterator[str]:
    budget = config.sampling.max_new_tokens
    if budget >= model.max_position_embeddings:
        yield (
            f"sampling.max_new_tokens {budget} and a prompt run past max_position_embeddings "
            f"{model.max_position_embeddings}; lower max_new_tokens"
        )


def _stages(config: RunConfig) -> Iterator[str]:
    phases: list[tuple[str, SftPhase]] = []
    if config.seed_stage is not None:
        if not config.seed_stage.phases:
            yield "seed_stage.phases is empty; add [[seed_stage.phases]], or remove [seed_stage]"
        phases = [(f"seed_stage.phases.{i}", p) for i, p in enumerate(config.seed_stage.phases)]
    for name, phase in phases:
        yield from _mixture(name, phase.mixture)
    if config.beta.mixture:
        yield "beta.mixture is set, but BETA learns from accepted rollouts; remove it"
    schedules = [(name, phase.num_steps, phase.optimizer) for name, phase in phases]
    for name, stage in (("zero", config.zero), ("beta", config.beta), ("npr", config.npr)):
        schedules.append((name, stage.num_steps, stage.optimizer))
    for name, num_steps, optimizer in schedules:
        yield from schedule_problems(name, num_steps, optimizer)
    if config.evaluation.speed_problems > config.evaluation.num_problems:
        yield (
            f"evaluation.speed_problems {config.evaluation.speed_problems} is above "
            f"evaluation.num_problems {config.evaluation.num_problems}; lower it"
        )


def _mixture(name: str, mixture: dict[str, float]) -> Iterator[str]:
    total = sum(mixture.values())
    if not mixture:
        yield f"{name}.mixture is missing; give the share of each kind of demonstration"
    elif min(mixture.values()) < 0 or abs(total - 1.0) > 1e-6:
        yield f"shares of {name}.mixture sum to {total:g} or are negative; make them sum to 1"


def schedule_problems(name: str, num_steps: int, optimizer: OptimizerConfig) -> Iterator[str]:
    """Yield what is wrong between the learning-rate schedule of ``name`` and its length."""
    if optimizer.warmup_steps >= num_steps and optimizer.warmup_steps > 0:
        yield (
            f"{name}.optimizer.warmup_steps {optimizer.warmup_steps} leaves nothing of "
            f"{name}.num_steps "
            f"{num_steps}; lower warmup_steps or raise num_steps"
        )


def _cluster(config: RunConfig) -> Iterator[str]:
    cluster = config.cluster
    if cluster.ray_address is not None and cluster.ray_port is not None:
        yield (
            f"cluster.ray_address {cluster.ray_address!r} joins a cluster and cluster.ray_port "
            f"{cluster.ray_port} starts one; keep one of them"
        )
    if cluster.gpus_per_trainer not in (0.0, 1.0):
        yield (
            f"cluster.gpus_per_trainer is {cluster.gpus_per_trainer:g}; a Megatron rank takes one "
            "whole GPU (1) or none (0)"
        )


def _prompt_file_problem(path: Path) -> str | None:
    """Return what is wrong with the first problem of ``path``; later lines are read by the run
    itself."""
    wanted = '{"id": ..., "question": ..., "answer": ...}'
    try:
        with path.open(encoding="utf-8") as lines:
            first = next((line for line in lines if line.strip()), None)
    except FileNotFoundError:
        return f"{path} does not exist; give a JSONL file, one {wanted} a line"
    except (OSError, UnicodeDecodeError) as error:
        return f"{path} cannot be read: {error}; give a UTF-8 JSONL file"
    if first is None:
        return f"{path} is empty; put one {wanted} on each line"
    try:
        record = json.loads(first)
    except json.JSONDecodeError as error:
        return f"{path}: the first line is not JSON ({error}); put one {wanted} on each line"
    if not isinstance(record, dict):
        return f"{path}: the first line is not an object; put one {wanted} on each line"
    missing = {"id", "question", "answer"}.difference(cast("dict[str, object]", record))
    if missing:
        lacks = ", ".join(sorted(missing))
        return f"{path}: the first line lacks {lacks}; put one {wanted} on each line"
    return None
