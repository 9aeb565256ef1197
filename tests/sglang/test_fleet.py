"""A fleet of SGLang replicas under Ray answers as one embedded engine does, and outlives losses."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil
import pytest
import torch

from npr_megatron.config.engine import ClusterConfig, EngineConfig, FleetConfig
from npr_megatron.launch.placement import place
from npr_megatron.launch.ray_cluster import RayCluster
from npr_megatron.rollout.fleet import Fleet
from npr_megatron.weights.executors.shared_memory import Publisher
from npr_megatron.weights.layouts import canonical_layout
from npr_megatron.weights.publication import Publication
from tests.engines import TINY
from tests.ray.conftest import engine_with, made_up_weights
from tests.ray.test_fleet import requests_of
from tests.structures import SMALL

pytestmark = pytest.mark.slow
CONFIG = EngineConfig(
    backend="sglang", num_kv_slots=4096, max_running=4, max_streams=32, debug_checks=True
)
FLEET = FleetConfig(num_replicas=1, push_timeout_s=300.0)
REQUESTS = requests_of(6, 4, max_new_tokens=60)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    cluster_config = ClusterConfig()
    with (
        RayCluster(cluster_config, place(None, FLEET, cluster_config)) as cluster,
        Fleet(
            cluster.replica_seats,
            TINY,
            CONFIG,
            FLEET,
            SMALL,
            source=canonical_layout(TINY),
            record=tmp_path_factory.mktemp("run") / "serving.json",
        ) as fleet,
    ):
        yield fleet


@pytest.fixture(scope="module")
def publisher(tmp_path_factory):
    publisher = Publisher(
        canonical_layout(TINY),
        0,
        torch.float32,
        run_id="sglang-fleet",
        arena_dir=tmp_path_factory.mktemp("arenas"),
    )
    yield publisher
    publisher.close()


def serve(fleet: Fleet, publisher: Publisher, seed: int, version: int) -> None:
    weights = made_up_weights(seed)
    fleet.push(Publication.assemble([publisher.publish(version, weights)]))


def assert_answers_as_embedded(fleet: Fleet, seed: int, version: int) -> None:
    answers = fleet.generate(REQUESTS)
    expected = engine_with(made_up_weights(seed), version).generate(REQUESTS)
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.token_ids.tolist() == wanted.token_ids.tolist()
        assert answer.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        assert set(answer.weight_versions.tolist()) == set(wanted.weight_versions.tolist())


def engine_processes(pid: int) -> list[psutil.Process]:
    """Return everything that the replica ``pid`` has started."""
    return psutil.Process(pid).children(recursive=True)


def gone(processes: list[psutil.Process], within_s: float = 20.0) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def hurt_while_decoding(pid: int, processes: list[psutil.Process]) -> threading.Thread:
    """Kill ``pid`` a moment after the next call begins; until then the scheduler among
    ``processes`` stands still, so that no answer comes earlier.
    """
    (scheduler,) = [process for process in processes if "scheduler" in process.name()]
    scheduler.suspend()

    def kill() -> None:
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def test_a_fleet_serves_each_version_that_is_pushed(fleet, publisher):
    for seed, version in ((0, 1), (1, 2)):
        serve(fleet, publisher, seed, version)
        assert_answers_as_embedded(fleet, seed, version)


def test_a_killed_replica_leaves_no_process_and_is_replaced(fleet, publisher):
    (pid,) = fleet.pids
    started = engine_processes(pid)
    assert any("sglang" in process.name() for process in started), started
    killer = hurt_while_decoding(pid, started)
    assert_answers_as_embedded(fleet, 1, 2)
    killer.join()
    assert gone(started)
    assert fleet.num_restarts == 1
    assert fleet.pids != (pid,)


def test_a_replica_whose_scheduler_is_killed_is_replaced(fleet, publisher):
    (pid,) = fleet.pids
    started = engine_processes(pid)
    (scheduler,) = [p for p in started if "scheduler" in p.name()]
    killer = hurt_while_decoding(scheduler.pid, started)
    assert_answers_as_embedded(fleet, 1, 2)
    killer.join()
    assert gone(started)
    assert fleet.num_restarts == 2
