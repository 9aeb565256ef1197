"""SglangEngine with the real SGLang: what it writes is what the embedded engine writes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from npr_megatron.config.engine import EngineConfig
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.engine.flow.flow import Teacher
from npr_megatron.engine.sglang.engine import SglangEngine
from npr_megatron.engine.sglang.folder import remove_dead_folders
from npr_megatron.engine.sglang.stage import Stage
from npr_megatron.errors import EngineLost, InputError
from npr_megatron.records.request import GenerationRequest, RefusalPolicy
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from npr_megatron.weights.layouts import engine_layout
from npr_megatron.weights.storages import box_reader, empty_storages, load_tiles
from tests.engines import (
    UNTIED,
    drain,
    random_weights,
    request_for,
    skeleton_of,
    step_until,
    teacher_of,
)
from tests.listeners import STREAMS, Replay
from tests.parity.hf_reference import hf_model
from tests.structures import SMALL, random_structure

CONFIG = EngineConfig(
    num_kv_slots=4096,
    max_running=16,
    max_streams=64,
    kv_after_push="recompute",
    debug_checks=True,
)
WEIGHTS = random_weights(UNTIED, 0)
EXACT = tuple(name for name in STREAMS if name != "logprobs")
Asked = list[tuple[GenerationRequest, Teacher]]


def storages(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as SGLang's engine takes them."""
    (layout,) = engine_layout(UNTIED, engine="sglang").ranks
    filled = empty_storages(layout, torch.float32)
    load_tiles(layout, box_reader(hf_model(UNTIED, weights).state_dict()), filled)
    return filled


@pytest.fixture(scope="module")
def started() -> Iterator[SglangEngine]:
    engine = SglangEngine(UNTIED, CONFIG, SMALL)
    engine.load(storages(WEIGHTS))
    yield engine
    engine.close()
    engine.close()


def asked(seed: int, count: int = 4, **options: object) -> Asked:
    """Requests led along random structures, half of them only by their tags."""
    rng = random.Random(seed)
    result: Asked = []
    for rollout in range(count):
        prompt = (20, 21, 22 + rng.randrange(2))
        structure = random_structure(
            rng, prompt, SMALL, num_blocks=(1, 3), max_branches=4, max_tokens=6
        )
        lead = teacher_of if rng.random() < 0.5 else skeleton_of
        request = request_for(prompt, rollout=rollout, seed=rng.getrandbits(64), **options)
        result.append((request, lead(structure.token_ids, len(prompt), SMALL)))
    return result


def expected(several: Asked) -> dict[int, Trajectory]:
    alone = EmbeddedEngine(UNTIED, CONFIG, SMALL)
    alone.load(WEIGHTS)
    for request, teacher in several:
        alone.add(request, teacher)
    return {trajectory.rollout: trajectory for trajectory in drain(alone)}


def assert_equal(found: list[Trajectory], several: Asked) -> None:
    wanted = expected(several)
    assert sorted(trajectory.rollout for trajectory in found) == sorted(wanted)
    for trajectory in found:
        other = wanted[trajectory.rollout]
        assert (trajectory.finish, trajectory.finish_detail) == (other.finish, other.finish_detail)
        for name in EXACT:
            np.testing.assert_array_equal(
                getattr(trajectory, name), getattr(other, name), err_msg=name
            )
        np.testing.assert_allclose(trajectory.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
        {"on_refusal": RefusalPolicy.SEQUENTIAL, "max_new_tokens": 70},
        {"max_critical_path": 45},
        {"mode": DecodeMode.SEQUENTIAL, "max_new_tokens": 40},
    ],
    ids=["greedy", "sampled", "filtered", "serving", "short of path", "sequential"],
)
def test_trajectories_are_those_of_the_embedded_engine(engine, options):
    several = asked(len(options), **options)
    for request, teacher in several:
        engine.add(request, teacher)
    assert_equal(drain(engine), several)


def test_events_rebuild_the_trajectories_they_tell_of(engine):
    several = asked(10)
    replays = {request.rollout: Replay(request.request_id) for request, _ in several}
    for request, teacher in several:
        engine.add(request, teacher, listener=replays[request.rollout].take)
    finished = drain(engine)
    assert_equal(finished, several)
    for trajectory in finished:
        replays[trajectory.rollout].assert_rebuilds(trajectory)


def test_preemption_changes_nothing(engine):
    several = asked(11)
    for request, teacher in several:
        engine.add(request, teacher, listener=lambda event: None)
    before, rng, finished = engine.stats(), random.Random(0), list[Trajectory]()
    for _ in range(12):
        if engine.num_unfinished:
            engine.preempt(rng.choice(list(engine.unfinished)))
            finished += engine.step()
    finished += drain(engine)
    assert_equal(finished, several)
    after = engine.stats()
    assert after.num_preemptions > before.num_preemptions
    assert after.num_replayed_tokens > before.num_replayed_tokens


def test_what_is_aborted_has_the_log_probs_of_its_tokens(engine):
    several = asked(12)
    for request, teacher in several:
        engine.add(request, teacher, listener=lambda event: None)
    finished = engine.step() + engine.step()
    for request_id in list(engine.unfinished):
        engine.abort(request_id)
    finished += drain(engine)
    assert any(trajectory.finish is FinishReason.ABORTED for trajectory in finished)
    for trajectory, logprobs in zip(finished, engine.score(finished), strict=True):
        np.testing.assert_allclose(trajectory.logprobs, logprobs, atol=1e-4)


def test_a_request_whose_time_is_up_ends_with_what_it_has(engine):
    request = request_for([20, 21], mode=DecodeMode.SEQUENTIAL, max_new_tokens=400, timeout_s=0.5)
    engine.add(request, lambda block, branch, index: 25, listener=lambda event: None)
    (trajectory,) = drain(engine)
    assert trajectory.finish is FinishReason.TIMEOUT
    assert 0 < trajectory.num_tokens < 400


def test_scores_are_the_log_probs_of_the_record(engine):
    trajectories = list(expected(asked(13)).values())
    for trajectory, logprobs in zip(trajectories, engine.score(trajectories), strict=True):
        np.testing.assert_allclose(logprobs, trajectory.logprobs, atol=1e-4)


def test_what_cannot_be_served_is_refused_by_name(engine):
    long = request_for([20], max_new_tokens=3000)
    punished = request_for([20], step_repetition_penalty=1.02)
    for request, word in ((long, "KV slots"), (punished, "step_repetition_penalty")):
        with pytest.raises(InputError, match=word):
            engine.add(request)
    with pytest.raises(InputError, match="p#7"):
        engine.abort("p#7")


def test_a_lease_that_nobody_needs_is_found(engine):
    """Control: what a trajectory leaves behind would show when all have ended."""
    conductor = engine._conductor
    left = Stage(trajectory="left", namespace="left", token_ids=[20, 21, 22], offset=0, keeps=True)
    engine._thread.ask(lambda: conductor._ask("", left, 0))
    with pytest.raises(AssertionError, match="rank 0 of SGLang holds 1 leases"):
        engine.check_integrity()
    engine._thread.ask(lambda: conductor._reservations._ranks[0].to_release.append("left"))


_OWNER = """
import time
from npr_megatron.engine.sglang.engine import SglangEngine
from tests.sglang.test_engine import CONFIG, SMALL, UNTIED

engine = SglangEngine(UNTIED, CONFIG, SMALL)
print(engine.host_pid, engine._folder.path, flush=True)
time.sleep(600)
"""


def descendants(pid: int) -> list[psutil.Process]:
    host = psutil.Process(pid)
    return [host, *host.children(recursive=True)]


def assert_all_end(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20.0)
    alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not alive


def test_nothing_survives_an_owner_that_is_killed():
    root = Path(__file__).parents[2]
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert owner.stdout is not None
    pid, folder = owner.stdout.readline().split()
    processes = descendants(int(pid))
    assert len(processes) >= 3
    remove_dead_folders()
    (memory,) = [entry.readlink() for entry in Path(folder).iterdir() if entry.is_symlink()]
    assert memory.exists()
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert_all_end(processes)
    remove_dead_folders()
    assert not (Path(folder).exists() or memory.exists())


def test_a_dead_scheduler_is_told_and_nothing_is_left():
    engine = SglangEngine(UNTIED, CONFIG, SMALL)
    try:
        engine.load(storages(WEIGHTS))
        engine.add(request_for([20], mode=DecodeMode.SEQUENTIAL), lambda *place: 25)
        processes = descendants(engine.host_pid)
        next(p for p in processes if "scheduler" in p.name()).kill()
        with pytest.raises(EngineLost, match="SGLang has ended"):
            step_until(engine, lambda: not engine.num_unfinished, within_s=60.0)
        assert_all_end(processes)
        with pytest.raises(EngineLost):
            engine.add(request_for([20], rollout=1))
    finally:
        engine.close()
