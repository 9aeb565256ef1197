"""Roles -> one placement group: pure, no Ray.

All trainer ranks and engine replicas of a run sit on one node, because weights travel through that
node's memory (``weights.executors.shared_memory``); so the group is packed strictly. Bundle i <
``num_trainers`` is trainer rank i, the rest are replicas in order. A replacement replica takes its
predecessor's bundle, so recovery never waits for resources that somebody else took.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from npr_megatron.config.engine import ClusterConfig, FleetConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Need:
    """CPUs and GPUs of one process, or free on one node; Ray's logical resources."""

    num_cpus: float
    num_gpus: float

    def as_bundle(self) -> dict[str, float]:
        """Return the bundle in Ray's words (a zero is left out: Ray refuses it)."""
        bundle = {"CPU": self.num_cpus}
        return bundle | {"GPU": self.num_gpus} if self.num_gpus else bundle


@dataclass(frozen=True, slots=True)
class Placement:
    """One bundle per process."""

    trainers: tuple[Need, ...]
    replicas: tuple[Need, ...]

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Bundles of the placement group: trainer ranks, then replicas."""
        return [need.as_bundle() for need in (*self.trainers, *self.replicas)]

    @property
    def total(self) -> Need:
        """What the node that carries the run must have free."""
        needs = (*self.trainers, *self.replicas)
        return Need(sum(n.num_cpus for n in needs), sum(n.num_gpus for n in needs))


def place(
    parallel: ParallelConfig | None, fleet: FleetConfig | None, cluster: ClusterConfig
) -> Placement:
    """Return the processes of a run; None leaves a role out (SFT alone, generating alone).

    Raises ConfigError listing each demand that Ray cannot express: above one, GPUs are given whole.
    """
    trainer = Need(cluster.cpus_per_trainer, cluster.gpus_per_trainer)
    replica = Need(cluster.cpus_per_replica, cluster.gpus_per_replica)
    problems = [
        f"cluster.{name} = {value}: Ray gives a part of one GPU, or whole ones; set it to at most "
        "1 "
        "or to a whole number"
        for name, value in (
            ("gpus_per_trainer", trainer.num_gpus),
            ("gpus_per_replica", replica.num_gpus),
        )
        if value > 1 and value != int(value)
    ]
    if problems:
        raise ConfigError(problems)
    return Placement(
        trainers=(trainer,) * (parallel.world_size if parallel else 0),
        replicas=(replica,) * (fleet.num_replicas if fleet else 0),
    )


def require_room(placement: Placement, free_nodes: Sequence[Need]) -> None:
    """Raise ConfigError naming what is missing unless some node of ``free_nodes`` can carry the
    whole run."""
    wanted = placement.total
    missing = [
        dataclasses.replace(
            wanted,
            num_cpus=max(0.0, wanted.num_cpus - node.num_cpus),
            num_gpus=max(0.0, wanted.num_gpus - node.num_gpus),
        )
        for node in free_nodes
    ]
    if any(lack.num_cpus == 0 and lack.num_gpus == 0 for lack in missing):
        return
    asked = (
        f"the run places {len(placement.trainers)} trainer ranks and {len(placement.replicas)} "
        "replicas on one "
        f"node and needs {wanted.num_cpus:g} CPUs and {wanted.num_gpus:g} GPUs there"
    )
    advice = (
        "lower parallel.*_size, fleet.num_replicas, cluster.cpus_per_* or cluster.gpus_per_*, "
        "or free a node"
    )
    if not missing:
        raise ConfigError(f"{asked}, the cluster has no live node; start one, or unset ray_address")
    nearest = min(missing, key=lambda lack: (lack.num_gpus, lack.num_cpus))
    raise ConfigError(
        f"{asked}; the nearest of {len(free_nodes)} nodes lacks {nearest.num_cpus:g} CPUs and "
        f"{nearest.num_gpus:g} GPUs; {advice}"
    )
