"""Can this machine carry the run? Answered before anything starts, with every problem at once.

:func:`check_environment` is pure: facts in, sentences out. Whether the sections of the run file fit
each other is ``config.check``'s business.
"""

from __future__ import annotations

from npr_megatron.config.model import ModelConfig
from npr_megatron.config.run import RunConfig
from npr_megatron.errors import ConfigError
from npr_megatron.launch.placement import place
from npr_megatron.launch.probe import Facts, Folder, gather_facts
from npr_megatron.launch.ray_cluster import OBJECT_STORE_BYTES
from npr_megatron.runtime.fused_kernels import fp8_problem
from npr_megatron.weights.executors.arena import arena_bytes
from npr_megatron.weights.layouts import trainer_layout
from npr_megatron.weights.storages import DTYPES

_MIB = 2**20


def require_environment(run: RunConfig, model: ModelConfig) -> None:
    """Raise ConfigError listing what this machine lacks for ``run``."""
    problems = check_environment(run, model, gather_facts(run))
    if problems:
        raise ConfigError(problems)


def check_environment(run: RunConfig, model: ModelConfig, facts: Facts) -> list[str]:
    """Return one sentence per problem: what was asked, what was found, what to do."""
    return [
        *_port(run, facts),
        *_output(facts),
        *_memory(run, model, facts),
        *_gpus(run, facts),
        *_fp8(run, facts),
    ]


def weight_bytes(run: RunConfig, model: ModelConfig) -> int:
    """Return the bytes of ``arena_dir`` that the arenas of all trainer ranks take."""
    dtype = DTYPES[run.engine.dtype]
    return sum(arena_bytes(rank, dtype) for rank in trainer_layout(model, run.parallel).ranks)


def _port(run: RunConfig, facts: Facts) -> list[str]:
    if not facts.port_problem:
        return []
    return [
        f"cluster.ray_port = {run.cluster.ray_port} was asked for, it cannot be taken "
        f"({facts.port_problem}); choose another port, or leave it out to take a free one"
    ]


def _output(facts: Facts) -> list[str]:
    if not facts.output.problem:
        return []
    return [
        f"results go below {facts.output.path}, which is {facts.output.problem}; set "
        "run.output_dir "
        "to a folder you may write to"
    ]


def _memory(run: RunConfig, model: ModelConfig, facts: Facts) -> list[str]:
    """Check the room for arenas and Ray's object store, together where they share a file system."""
    needs: list[tuple[Folder, int, str]] = [
        (facts.arena, weight_bytes(run, model), "weights on their way to the engines"),
    ]
    if run.cluster.ray_address is None:
        needs.append((facts.object_store, OBJECT_STORE_BYTES, "Ray's object store"))
    problems = [
        f"{folder.path} must hold {purpose}, it is: {folder.problem}; set cluster.arena_dir to a "
        "writable memory-backed folder"
        for folder, _, purpose in needs
        if folder.problem
    ]
    for device in dict.fromkeys(folder.device for folder, _, _ in needs if not folder.problem):
        here = [need for need in needs if need[0].device == device]
        wanted, free = sum(size for _, size, _ in here), here[0][0].free_bytes
        if wanted > free:
            problems.append(
                f"{here[0][0].path} needs {wanted / _MIB:.1f} MiB for "
                f"{' and '.join(purpose for _, _, purpose in here)}, {free / _MIB:.1f} MiB are "
                "free; remove old files there, enlarge it (mount -o remount,size=...), or set "
                "cluster.arena_dir to a larger memory-backed folder"
            )
    return problems


def _gpus(run: RunConfig, facts: Facts) -> list[str]:
    if facts.gpus is None:
        return []
    wanted = place(run.parallel, run.fleet, run.cluster).total.num_gpus
    if facts.gpu_problem:
        return [
            f"the run needs {wanted:g} GPUs, {facts.gpu_problem}; run on a machine with GPUs (and "
            "the "
            "extra npr-megatron[gpu]), or set cluster.gpus_per_trainer and gpus_per_replica to 0"
        ]
    if wanted > len(facts.gpus):
        return [
            f"the run needs {wanted:g} GPUs, the machine shows {len(facts.gpus)} "
            f"({', '.join(facts.gpus) or 'none'}); lower parallel.*_size, fleet.num_replicas or "
            "the "
            "shares cluster.gpus_per_*"
        ]
    return []


def _fp8(run: RunConfig, facts: Facts) -> list[str]:
    """A trainer rank may get any of the GPUs, so the oldest one counts."""
    if run.trainer.fp8 is None or not facts.gpu_capabilities:
        return []
    oldest = min(facts.gpu_capabilities)
    problem = fp8_problem(run.trainer.fp8, oldest, facts.without_transformer_engine)
    return [problem] if problem else []
