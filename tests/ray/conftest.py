"""One Ray session for all tests that need one, and the publisher of made-up weights."""

import itertools
from collections.abc import Mapping

import pytest
import torch

from npr_megatron.config.engine import ClusterConfig, EngineConfig, FleetConfig
from npr_megatron.config.model import InitConfig
from npr_megatron.config.training import ParallelConfig
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.interface import Engine
from npr_megatron.launch.placement import place
from npr_megatron.launch.ray_cluster import RayCluster
from npr_megatron.weights.checkpoints.hf import random_init
from npr_megatron.weights.executors.inproc import execute
from npr_megatron.weights.executors.shared_memory import Publisher
from npr_megatron.weights.layouts import canonical_layout, engine_layout
from npr_megatron.weights.plans.plan import plan_transfer
from npr_megatron.weights.publication import Publication
from tests.engines import TINY
from tests.structures import SMALL

PARALLEL = ParallelConfig(pp_size=2)


@pytest.fixture(scope="package")
def cluster():
    """A private head with seats for two trainer ranks and two replicas."""
    config = ClusterConfig()
    with RayCluster(config, place(PARALLEL, FleetConfig(num_replicas=2), config)) as cluster:
        yield cluster


def made_up_weights(seed: int) -> dict[str, torch.Tensor]:
    """Canonical weights under which every token is likely enough."""
    return random_init(TINY, InitConfig(embedding_std=0.5), seed)


def engine_with(weights: Mapping[str, torch.Tensor], version: int) -> Engine:
    """An engine in this process: the oracle of what a fleet must answer."""
    engine = EmbeddedEngine(TINY, EngineConfig(), SMALL)
    plan = plan_transfer(canonical_layout(TINY), engine_layout(TINY))
    execute(plan, {0: weights}, {0: engine.staging()})
    engine.commit(version)
    return engine


@pytest.fixture(scope="package")
def publish(tmp_path_factory):
    """Publishes weights as one rank that holds the whole model; versions grow from call to call."""
    publisher = Publisher(
        canonical_layout(TINY),
        0,
        torch.float32,
        run_id="made-up",
        arena_dir=tmp_path_factory.mktemp("arenas"),
    )
    versions = itertools.count(1)

    def publish_next(weights: Mapping[str, torch.Tensor]) -> Publication:
        return Publication.assemble([publisher.publish(next(versions), weights)])

    yield publish_next
    publisher.close()
