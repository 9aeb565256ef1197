"""Weight versions: one growing number per update of a run, the same after a restart."""

from __future__ import annotations

from npr_megatron.config.run import RunConfig
from npr_megatron.config.stages import STAGES, StageName


def weight_version(config: RunConfig, stage: StageName, step: int) -> int:
    """Return the version of the weights after ``step`` steps of ``stage``; 0 is its start."""
    version = 1
    for name in STAGES:
        if name == stage:
            return version + step
        version += num_steps(config, name) + 1
    raise AssertionError(stage)


def num_steps(config: RunConfig, stage: StageName) -> int:
    """Return the optimizer steps of a stage; 0 for rejection sampling."""
    if stage == "seed":
        phases = config.seed_stage.phases if config.seed_stage else ()
        return sum(phase.num_steps for phase in phases)
    if stage == "sample":
        return 0
    return {"zero": config.zero, "beta": config.beta, "npr": config.npr}[stage].num_steps
