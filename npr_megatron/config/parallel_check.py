"""Every problem with ``[parallel]`` at once, before any process starts: pure.

A sentence has three parts: the fields, what they are against what they must be, what to change.
:func:`layout_problems` is what keeps the weights from being cut, which holds for training and for
moving weights alike; :func:`parallel_problems` adds what training asks for.

Traps that no field can set are closed in ``model``: interleaved chunks on two stages need
``batch_p2p_comm`` off, or Megatron silently swaps two messages between them; experts are reached
all-to-all, which takes any number of tokens for each of them; tensor parallelism, which experts
bear with sequence parallelism only, always brings it; and an expert's gradient is summed over the
replicas of the expert, which Megatron forgets where etp differs from tp without ep.
"""

from __future__ import annotations

from collections.abc import Iterator

from npr_megatron.config.alignment import fp8_multiple, row_multiple
from npr_megatron.config.device_memory import rank_memory
from npr_megatron.config.divisions import attention_problems, divides, mlp_problems
from npr_megatron.config.fp8_check import recipe_problems, shape_problems
from npr_megatron.config.model import ModelConfig
from npr_megatron.config.optimizer_check import optimizer_problems
from npr_megatron.config.pipeline import pipeline_problems
from npr_megatron.config.training import ParallelConfig, TrainerConfig

_GIB = 2**30


def parallel_problems(
    parallel: ParallelConfig, trainer: TrainerConfig, model: ModelConfig | None
) -> list[str]:
    """Return every problem of training ``model`` laid out as ``parallel``; empty when it can run.

    Args:
        parallel: a section whose single fields are valid.
        trainer: rows, numerics and the memory of a device.
        model: what is trained; without it the rules about its shape are skipped.
    """
    problems = [*_rows(parallel, trainer), *_replicas(parallel)]
    problems += [*recipe_problems(parallel, trainer), *optimizer_problems(parallel, trainer)]
    if model is None:
        return problems
    shape = layout_problems(model, parallel)
    problems += [*shape, *shape_problems(model, parallel, trainer)]
    if not shape:
        problems += _memory(model, parallel, trainer)
    return problems


def layout_problems(model: ModelConfig, parallel: ParallelConfig) -> list[str]:
    """Return everything that keeps the weights of ``model`` from being cut as ``parallel`` says."""
    tp_size = parallel.tp_size
    experts_by = "parallel.etp_size" if parallel.etp_size else "parallel.tp_size"
    asked_by = ("parallel.tp_size", experts_by)
    problems = [
        *attention_problems(model, tp_size, "parallel.tp_size"),
        *mlp_problems(model, tp_size, parallel.expert_tp_size, asked_by),
        *_experts(model, parallel),
        *pipeline_problems(model.num_hidden_layers, parallel),
    ]
    qkv_rows = (model.num_attention_heads + 2 * model.num_key_value_heads) * model.head_dim
    if qkv_rows % tp_size:
        problems.append(
            f"the fused qkv matrix has {qkv_rows} rows, not a multiple of parallel.tp_size "
            f"{tp_size}; choose one that divides it"
        )
    return problems


def _experts(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    ep_size, etp_size = parallel.ep_size, parallel.expert_tp_size
    if model.moe is None:
        if ep_size > 1 or parallel.etp_size is not None:
            yield (
                f"parallel.ep_size {ep_size} or etp_size {parallel.etp_size} spreads experts and "
                "the model has none; remove both"
            )
        return
    yield from divides("num_experts", model.moe.num_experts, ep_size, "parallel.ep_size")
    if parallel.ranks_per_stage % (ep_size * etp_size):
        yield (
            f"parallel.ep_size {ep_size} * etp_size {etp_size} does not divide the "
            f"{parallel.ranks_per_stage} ranks of a stage (tp * cp * dp); change one of them"
        )


def _rows(parallel: ParallelConfig, trainer: TrainerConfig) -> Iterator[str]:
    """Rows are padded until they divide; longer than ``row_tokens`` none shall become."""
    slices, multiple = parallel.row_slices, row_multiple(parallel, trainer)
    if trainer.row_tokens % multiple == 0 or (slices == 1 and trainer.fp8 is None):
        return
    reasons: list[str] = []
    if slices > 1:
        named = f"parallel.tp_size {parallel.tp_size}"
        if parallel.cp_size > 1:
            named += f" with cp_size {parallel.cp_size}"
        reasons.append(
            f"{named} cuts rows into {slices} equal slices (sequence parallel, and two for each "
            "rank of cp)"
        )
    if trainer.fp8 is not None:
        reasons.append(f"{trainer.fp8} FP8 takes {fp8_multiple(trainer)} tokens at a time")
    yield (
        f"{' and '.join(reasons)}, so rows are padded to multiples of {multiple} tokens, and "
        f"trainer.row_tokens is {trainer.row_tokens}; make it "
        f"{-(-trainer.row_tokens // multiple) * multiple}"
    )


def _replicas(parallel: ParallelConfig) -> Iterator[str]:
    if parallel.overlap_data_parallel and parallel.dp_size * parallel.cp_size == 1:
        yield (
            "parallel.overlap_data_parallel is set and there is one replica, parallel.dp_size 1; "
            "remove it, or raise dp_size"
        )


def _memory(model: ModelConfig, parallel: ParallelConfig, trainer: TrainerConfig) -> Iterator[str]:
    """The stages differ; the one that needs most is named."""
    if trainer.device_memory_gib is None:
        return
    stages = [rank_memory(model, parallel, trainer, stage) for stage in range(parallel.pp_size)]
    stage = max(range(parallel.pp_size), key=lambda stage: stages[stage].total)
    needed = stages[stage]
    if needed.total <= trainer.device_memory_gib * _GIB:
        return
    yield (
        f"a rank of stage {stage} is estimated to need {needed.total / _GIB:.1f} GiB (weights "
        f"{needed.weights / _GIB:.1f}, gradients {needed.gradients / _GIB:.1f}, optimizer "
        f"{needed.optimizer / _GIB:.1f}, activations {needed.activations / _GIB:.1f}, workspace "
        f"{needed.workspace / _GIB:.1f}) and "
        f"trainer.device_memory_gib is {trainer.device_memory_gib:g}; raise parallel.tp_size, "
        "pp_size or dp_size, lower trainer.row_tokens or rows_per_microbatch, or set "
        "trainer.recompute or optimizer_offload_frac"
    )
