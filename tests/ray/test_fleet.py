"""A fleet of real processes answers as one engine does, whatever happens to its replicas."""

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from npr_megatron.config.engine import EngineConfig, FleetConfig
from npr_megatron.errors import EnvironmentFault, InputError, StaleWeightsError
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import DecodeMode, Trajectory
from npr_megatron.rollout.fleet import Fleet
from npr_megatron.rollout.health import Health, ReplicaState, Stamp
from npr_megatron.weights.executors.shared_memory import Publisher
from npr_megatron.weights.layouts import canonical_layout
from npr_megatron.weights.publication import Publication
from tests.engines import TINY, request_for
from tests.ray.conftest import engine_with, made_up_weights
from tests.structures import SMALL

pytestmark = pytest.mark.slow
OLD, NEW = made_up_weights(0), made_up_weights(1)


def requests_of(num_prompts: int, num_rollouts: int, max_new_tokens: int = 60):
    """Requests of both modes, each with its own seed."""
    modes = (DecodeMode.SEQUENTIAL, DecodeMode.PARALLEL)
    return [
        request_for(
            (20, 21 + prompt),
            prompt_id=f"p{prompt}",
            rollout=rollout,
            mode=modes[prompt % 2],
            seed=100 * prompt + rollout,
            max_new_tokens=max_new_tokens,
            max_critical_path=max_new_tokens,
        )
        for prompt in range(num_prompts)
        for rollout in range(num_rollouts)
    ]


FEW_AT_ONCE = EngineConfig(max_running=4)
LONG = [
    dataclasses.replace(request, mode=DecodeMode.SEQUENTIAL)
    for request in requests_of(8, 16, max_new_tokens=400)
]
"""Hundreds of steps when four run at once: time enough to hurt somebody."""


def stamp_of(publication: Publication) -> Stamp:
    return Stamp(publication.version, publication.digest)


def assert_same(found: list[Trajectory], expected: list[Trajectory]) -> None:
    """Bitwise the same tokens under the same versions; log-probs up to the order of sums."""
    for one, other in zip(found, expected, strict=True):
        assert (one.prompt_id, one.rollout) == (other.prompt_id, other.rollout)
        for stream in ("token_ids", "position_ids", "block", "branch", "forced", "weight_versions"):
            np.testing.assert_array_equal(getattr(one, stream), getattr(other, stream))
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        assert (one.finish, one.finish_detail) == (other.finish, other.finish_detail)


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run") / "serving.json"


@pytest.fixture(scope="module")
def fleet(cluster, record):
    """Two replicas with few requests at once."""
    config = FleetConfig(num_replicas=2, request_timeout_s=60, push_timeout_s=8, max_restarts=6)
    with Fleet(
        cluster.replica_seats,
        TINY,
        FEW_AT_ONCE,
        config,
        SMALL,
        source=canonical_layout(TINY),
        record=record,
    ) as fleet:
        yield fleet


def test_nothing_is_generated_before_weights_are_pushed(fleet):
    assert fleet.version == -1
    with pytest.raises(StaleWeightsError, match="push first"):
        fleet.generate(requests_of(1, 1))


def test_two_replicas_answer_as_one_engine_in_this_process(fleet, publish):
    publication = publish(OLD)
    fleet.push(publication)
    assert fleet.states == (ReplicaState(Health.HEALTHY, stamp_of(publication)),) * 2
    requests, arrived = requests_of(6, 4), []
    found = fleet.generate(requests, arrived.append)
    assert_same(found, engine_with(OLD, publication.version).generate(requests))
    assert sorted(map(id, arrived)) == sorted(map(id, found))


def test_a_push_changes_versions_and_answers(fleet, publish):
    requests = requests_of(4, 2)
    before = engine_with(OLD, 0).generate(requests)
    publication = publish(NEW)
    fleet.push(publication)
    after = fleet.generate(requests)
    assert_same(after, engine_with(NEW, publication.version).generate(requests))
    assert any(
        not np.array_equal(one.token_ids, other.token_ids)
        for one, other in zip(before, after, strict=True)
    )


def test_a_push_while_decoding_takes_effect_between_two_steps(fleet, publish):
    old_version, pushed = fleet.version, []

    def push_once(trajectory: Trajectory) -> None:
        if not pushed:
            pushed.append(publish(OLD))
            fleet.push(pushed[0])

    found = fleet.generate(LONG, push_once)
    for trajectory in found:
        versions = trajectory.weight_versions[trajectory.prompt_length :]
        assert set(versions) <= {old_version, pushed[0].version}
        assert (np.diff(versions) >= 0).all()
    last = {int(trajectory.weight_versions[-1]) for trajectory in found}
    assert last == {old_version, pushed[0].version}


def test_weights_that_are_not_what_was_published_are_not_served(fleet, publish):
    version = fleet.version
    publication = publish(NEW)
    forged = dataclasses.replace(publication, digest=publication.digest ^ 1)
    with pytest.raises(StaleWeightsError, match="digest"):
        fleet.push(forged)
    requests = requests_of(2, 2)
    assert_same(fleet.generate(requests), engine_with(OLD, version).generate(requests))
    with pytest.raises(StaleWeightsError, match="only grow"):
        fleet.push(dataclasses.replace(publication, version=version))


def test_a_refused_request_leaves_the_fleet_ready(fleet):
    requests = requests_of(4, 1)
    too_long = request_for((20,) * 600, prompt_id="long")
    with pytest.raises(InputError, match="long#0"):
        fleet.generate([*requests, too_long])
    with pytest.raises(InputError, match="share an id"):
        fleet.generate([requests[0], requests[0]])
    expected = engine_with(OLD, fleet.version).generate(requests)
    assert_same(fleet.generate(requests), expected)


def test_an_interrupted_generate_leaves_the_fleet_ready(fleet):
    def interrupt(trajectory: Trajectory) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fleet.generate(LONG, interrupt)
    requests = requests_of(4, 2)
    expected = engine_with(OLD, fleet.version).generate(requests)
    assert_same(fleet.generate(requests), expected)


def generate_and_hurt(
    fleet: Fleet, requests: list[GenerationRequest], sign: signal.Signals, victim: int
) -> list[Trajectory]:
    """Send ``sign`` to a replica as soon as the first trajectory has arrived."""
    hurt = []

    def on_finish(trajectory: Trajectory) -> None:
        if not hurt:
            hurt.append(fleet.pids[victim])
            os.kill(hurt[0], sign)

    found = fleet.generate(requests, on_finish)
    assert hurt
    assert hurt[0] not in fleet.pids
    assert not psutil.pid_exists(hurt[0])
    return found


def test_a_killed_replica_is_replaced_and_the_answers_are_those_of_an_undisturbed_run(fleet):
    expected = engine_with(OLD, fleet.version).generate(LONG)
    restarts, survivor = fleet.num_restarts, fleet.pids[1]
    assert_same(generate_and_hurt(fleet, LONG, signal.SIGKILL, victim=0), expected)
    assert fleet.num_restarts == restarts + 1
    assert fleet.pids[1] == survivor
    assert [state.health for state in fleet.states] == [Health.HEALTHY] * 2


def test_a_replica_lost_while_idle_is_replaced_by_the_next_push(fleet, publish):
    os.kill(fleet.pids[1], signal.SIGKILL)
    publication = publish(NEW)
    fleet.push(publication)
    assert fleet.states == (ReplicaState(Health.HEALTHY, stamp_of(publication)),) * 2
    requests = requests_of(4, 1)
    expected = engine_with(NEW, publication.version).generate(requests)
    assert_same(fleet.generate(requests), expected)


def test_a_stopped_replica_is_fenced_and_comes_back_with_the_current_weights_only(
    fleet, publish, record
):
    restarts, pids, requests = fleet.num_restarts, fleet.pids, requests_of(4, 1)
    os.kill(pids[1], signal.SIGSTOP)
    for weights in (OLD, NEW):  # the second push does not even wait for it
        publication = publish(weights)
        fleet.push(publication)
        assert fleet.states[0] == ReplicaState(Health.HEALTHY, stamp_of(publication))
        assert fleet.states[1].health is Health.FENCED
        expected = engine_with(weights, publication.version).generate(requests)
        assert_same(fleet.generate(requests), expected)
    told = json.loads(record.read_text())
    assert (told["version"], told["digest"]) == (publication.version, f"{publication.digest:#018x}")
    assert [replica["pid"] for replica in told["replicas"]] == list(pids)
    assert [replica["health"] for replica in told["replicas"]] == ["healthy", "fenced"]
    os.kill(pids[1], signal.SIGCONT)
    deadline = time.monotonic() + 60
    while fleet.states[1].health is not Health.HEALTHY:
        assert time.monotonic() < deadline, fleet.states
        assert_same(fleet.generate(requests), expected)
    assert fleet.states[1] == ReplicaState(Health.HEALTHY, stamp_of(publication))
    assert (fleet.pids, fleet.num_restarts) == (pids, restarts)
    assert_same(fleet.generate(requests), expected)


def test_a_replica_killed_while_it_stages_does_not_stop_the_others(fleet, publish):
    victim, survivor = fleet.pids
    os.kill(victim, signal.SIGSTOP)  # it is staging from the beginning of the push to its end
    killer = threading.Timer(1.0, os.kill, (victim, signal.SIGKILL))
    killer.start()
    publication = publish(OLD)
    fleet.push(publication)
    killer.join()
    assert fleet.states == (ReplicaState(Health.HEALTHY, stamp_of(publication)),) * 2
    assert victim not in fleet.pids
    assert fleet.pids[1] == survivor
    requests = requests_of(4, 1)
    expected = engine_with(OLD, publication.version).generate(requests)
    assert_same(fleet.generate(requests), expected)


def test_after_the_trainer_a_lost_replica_is_replaced_from_its_peer(fleet, tmp_path):
    publisher = Publisher(
        canonical_layout(TINY), 0, torch.float32, run_id="mortal", arena_dir=tmp_path
    )
    publication = Publication.assemble([publisher.publish(fleet.version + 1, NEW)])
    fleet.push(publication)
    publisher.close()
    assert list(tmp_path.iterdir()) == []
    os.kill(fleet.pids[0], signal.SIGKILL)
    requests = requests_of(6, 2)
    expected = engine_with(NEW, publication.version).generate(requests)
    assert_same(fleet.generate(requests), expected)
    assert_same(fleet.generate(requests), expected)
    assert fleet.states == (ReplicaState(Health.HEALTHY, stamp_of(publication)),) * 2
    assert list(tmp_path.iterdir()) == []


def test_a_silent_replica_is_given_up_and_too_many_losses_end_the_fleet(cluster, publish):
    config = FleetConfig(num_replicas=1, request_timeout_s=6, max_restarts=1)
    seats = cluster.trainer_seats[:1]  # free here; a seat is a seat
    source = canonical_layout(TINY)
    with Fleet(seats, TINY, FEW_AT_ONCE, config, SMALL, source=source) as fleet:
        publication = publish(OLD)
        fleet.push(publication)
        requests = LONG[:64]
        expected = engine_with(OLD, publication.version).generate(requests)
        found = generate_and_hurt(fleet, requests, signal.SIGSTOP, victim=0)
        assert_same(found, expected)
        os.kill(fleet.pids[0], signal.SIGKILL)
        with pytest.raises(EnvironmentFault, match="after 1 replacements"):
            fleet.generate(requests_of(1, 1))
        with pytest.raises(EnvironmentFault, match="has ended"):
            fleet.push(publication)


def test_closing_ends_every_process(cluster, publish):
    config = FleetConfig(num_replicas=1)
    seats = cluster.trainer_seats[:1]
    with Fleet(seats, TINY, EngineConfig(), config, SMALL, source=canonical_layout(TINY)) as fleet:
        (pid,) = fleet.pids
        assert psutil.pid_exists(pid)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.05)
