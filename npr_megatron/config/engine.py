"""The rollout fleet and the engines in it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from npr_megatron.config.base import Section


class SglangConfig(Section):
    """What only the SGLang backend has."""

    dp_size: PositiveInt = 1
    """Data-parallel ranks: copies of the model in one engine, each on ``engine.tp_size`` devices
    and with a pool of its own. A trajectory is decoded by one of them, all its branches included;
    pushed weights reach all of them before the next token. For small models on nodes with many
    devices: one engine then takes as many trajectories as several replicas would."""
    overlap: bool = True
    """Schedule the next batch while one is computed. Not with ``kv_after_push = "keep"``."""
    cuda_graphs: bool = True
    """Capture decoding steps; without a GPU there is nothing to capture."""
    attention_backend: str | None = None
    """SGLang's name of its attention kernels; None is SGLang's choice for the device."""
    start_timeout_s: PositiveFloat = 600.0
    """An engine that does not serve by then is given up."""


class EngineConfig(Section):
    """One NPR Engine: a replica of the fleet, or what ``npr generate`` and ``npr serve`` run."""

    backend: Literal["embedded", "sglang"] = "embedded"
    """Who computes. ``embedded``: this package, on CPU or GPU. ``sglang``: SGLang, where it is
    installed (``tools/setup_sglang``)."""
    tp_size: PositiveInt = 1
    """Devices that share one SGLang engine; the embedded one is cut by torchrun instead."""
    sglang: SglangConfig = SglangConfig()
    dtype: Literal["fp32", "bf16"] = "fp32"
    weights: Literal["as_trained", "fp8"] = "as_trained"
    """How the matrices of the layers are kept. ``fp8``: e4m3 with one scale per block of 128 x 128;
    embedding, norms and head stay in ``dtype``."""
    num_kv_slots: PositiveInt = 65_536
    """Tokens whose keys and values fit; under SGLang, in each data-parallel rank."""
    max_running: PositiveInt = 128
    """Trajectories decoded at once."""
    max_streams: PositiveInt = 512
    """Streams (trunks and branches) that take a token per step; with more of them open, branches
    run in waves. Under SGLang, in each data-parallel rank."""
    max_step_tokens: PositiveInt = 2048
    """Tokens per forward pass: longer prompts are computed piece by piece while others decode."""
    max_plans: int = Field(default=5, ge=1, le=9)
    """Largest number of branches per fork."""
    kv_after_push: Literal["drop", "recompute", "keep"] = "drop"
    """What becomes of unfinished trajectories when weights change. ``drop``: they start again from
    their prompts, each finished one is of one version. ``recompute``: they keep their tokens, keys
    and values are computed anew. ``keep``: they keep both."""
    record_routes: bool = False
    """Record which experts computed each token, so that the trainer can compute it with the same
    ones. Reinforcement learning of a model with experts switches it on."""
    debug_checks: bool = False
    """Verify the slot partition after every step, and that SGLang's ranks agree."""

    @property
    def num_devices(self) -> int:
        """Devices that compute for one engine."""
        return self.tp_size * (self.sglang.dp_size if self.backend == "sglang" else 1)

    @property
    def start_timeout_s(self) -> float:
        """Time for an engine process to come up: to import torch and build the engine, which on a
        busy machine takes long, whatever a request may take."""
        own_s = 300.0
        return own_s + self.sglang.start_timeout_s if self.backend == "sglang" else own_s

    @model_validator(mode="after")
    def _branches_fit_a_step(self) -> EngineConfig:
        if self.max_streams < self.max_plans:
            raise ValueError(
                f"max_streams is {self.max_streams}, a fork may open {self.max_plans} branches at "
                "once; raise max_streams or lower max_plans"
            )
        return self


class FleetConfig(Section):
    """Engine replicas and how they are watched."""

    num_replicas: PositiveInt = 2
    request_timeout_s: PositiveFloat = 600.0
    """A replica silent for longer is replaced."""
    push_timeout_s: PositiveFloat = 120.0
    """A replica that has not taken over pushed weights by then is left behind by the others."""
    max_restarts: NonNegativeInt = 3
    """Replacements per run before it stops."""


class ClusterConfig(Section):
    """Ray and the node."""

    ray_address: str | None = None
    """Join this cluster (``auto`` under sbatch); None starts a private one on this machine."""
    ray_port: int | None = Field(default=None, ge=1024, le=65535)
    """Port of the private cluster's head; None takes a free one."""
    cpus_per_trainer: PositiveFloat = 1.0
    gpus_per_trainer: float = Field(default=0.0, ge=0)
    cpus_per_replica: PositiveFloat = 1.0
    gpus_per_replica: float = Field(default=0.0, ge=0)
    arena_dir: str = "/dev/shm"
    """Memory-backed folder through which weights reach engines of the same node."""
