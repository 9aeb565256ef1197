"""Weights that change under trajectories: versions, checks, and what becomes of keys and values."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from npr_megatron.engine.interface import Engine
from npr_megatron.errors import DivergenceError, LayoutError, StaleWeightsError
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from tests.contract.backends import MODEL, ROUNDING, Asked, Backend, Subject, decode
from tests.contract.test_events import trees
from tests.engines import (
    assert_same_trajectory,
    drain,
    random_weights,
    request_for,
    step_until,
    teacher_of_labels,
    tiny_engine,
)
from tests.listeners import Replay, assert_told

NUM_WORDS = 120


def commit(engine: Engine, backend: Backend, seed: int, version: int) -> None:
    backend.stage(engine, random_weights(MODEL, seed))
    engine.seal()
    engine.commit(version)


def texts(num_texts: int, first: int = 100) -> list[Asked]:
    """Plain texts of the model's own choice, of one length."""
    return [
        (
            request_for(
                (20, 21, 22 + i % 3),
                rollout=first + i,
                seed=i,
                mode=DecodeMode.SEQUENTIAL,
                max_new_tokens=NUM_WORDS,
            ),
            None,
        )
        for i in range(num_texts)
    ]


def add_listening(engine: Engine, asked: list[Asked]) -> list[Replay]:
    replays = [Replay(request.request_id) for request, _ in asked]
    for (request, teacher), replay in zip(asked, replays, strict=True):
        engine.add(request, teacher, replay.take)
    return replays


def test_an_engine_without_weights_says_so(subject: Subject) -> None:
    assert "holds no weights" in subject.complaints["step"]
    assert "holds no weights" in subject.complaints["score"]
    assert "nothing is staged" in subject.complaints["commit"]


def test_what_is_loaded_is_served_under_its_version(engine: Engine, backend: Backend) -> None:
    asked = trees(backend, 3)
    for seed, version in ((1, 5), (2, 3), (3, 3)):
        weights = random_weights(MODEL, seed)
        backend.load(engine, weights, version)
        assert engine.weight_version == version
        stored = backend.stored(weights)
        assert set(engine.weights) == set(stored)
        assert all(torch.equal(engine.weights[name], stored[name]) for name in stored)
        expected = backend.expected(asked, weights, version)
        for pair in zip(decode(engine, asked), expected, strict=True):
            assert_same_trajectory(*pair, tolerance=ROUNDING)


def test_what_is_committed_is_served_and_only_if_it_is_newer(
    engine: Engine, backend: Backend
) -> None:
    asked = trees(backend, 3)
    backend.load(engine, random_weights(MODEL, 1), version=4)
    before = decode(engine, asked)
    backend.stage(engine, random_weights(MODEL, 2))
    for version in (3, 4):
        with pytest.raises(StaleWeightsError, match=f"version {version} .* over version 4"):
            engine.commit(version)
    for pair in zip(decode(engine, asked), before, strict=True):
        assert_same_trajectory(*pair, tolerance=ROUNDING)
    engine.commit(6)
    assert engine.weight_version == 6
    expected = backend.expected(asked, random_weights(MODEL, 2), 6)
    for pair in zip(decode(engine, asked), expected, strict=True):
        assert_same_trajectory(*pair, tolerance=ROUNDING)
    stored = backend.stored(random_weights(MODEL, 2))
    assert all(torch.equal(engine.weights[name], stored[name]) for name in stored)


def test_the_shadow_can_be_filled_again_and_again(engine: Engine, backend: Backend) -> None:
    """Staged twice without a commit, then committed twice: the last filling is what counts."""
    asked = trees(backend, 2)
    backend.load(engine, random_weights(MODEL, 0), version=0)
    backend.stage(engine, random_weights(MODEL, 3))
    engine.seal()
    commit(engine, backend, seed=4, version=1)
    commit(engine, backend, seed=5, version=2)
    expected = backend.expected(asked, random_weights(MODEL, 5), 2)
    for pair in zip(decode(engine, asked), expected, strict=True):
        assert_same_trajectory(*pair, tolerance=ROUNDING)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_never_become_live(
    engine: Engine, backend: Backend, number: float
) -> None:
    asked = trees(backend, 2)
    backend.load(engine, random_weights(MODEL, 1), version=2)
    before = decode(engine, asked)
    weights = random_weights(MODEL, 5)
    weights["layers.1.down_proj.weight"][3, 3] = number
    backend.stage(engine, weights)
    for refused in (
        engine.seal,
        lambda: engine.commit(3),
        lambda: backend.load(engine, weights, 3),
    ):
        with pytest.raises(DivergenceError, match=r"layers\.1\.(mlp\.)?down_proj\.weight of"):
            refused()
    assert engine.weight_version == 2
    for pair in zip(decode(engine, asked), before, strict=True):
        assert_same_trajectory(*pair, tolerance=ROUNDING)


def test_loading_names_every_storage_that_does_not_fit(engine: Engine, backend: Backend) -> None:
    asked = trees(backend, 2)
    backend.load(engine, random_weights(MODEL, 1), version=2)
    before = decode(engine, asked)
    weights = backend.stored(random_weights(MODEL, 0))
    norm = min((name for name in weights if name.endswith("norm.weight")), key=len)
    embedding = next(name for name in weights if "embed_tokens" in name)
    weights[norm] = torch.ones(3)
    weights["extra"] = weights.pop(embedding)
    with pytest.raises(LayoutError) as error:
        engine.load(weights, 7)
    assert str(error.value).splitlines() == [
        f"storage {embedding} is missing",
        "storage extra is unknown",
        f"storage {norm} has shape (3,), expected (32,)",
    ]
    assert engine.weight_version == 2
    for pair in zip(decode(engine, asked), before, strict=True):
        assert_same_trajectory(*pair, tolerance=ROUNDING)


def test_another_thread_stages_while_steps_run(engine: Engine, backend: Backend) -> None:
    backend.load(engine, random_weights(MODEL, 1), version=0)
    asked = texts(3)

    def fill() -> None:
        backend.stage(engine, random_weights(MODEL, 2))
        engine.seal()

    filler = threading.Thread(target=fill)
    for request, teacher in asked:
        engine.add(request, teacher)
    filler.start()
    found = sorted(drain(engine), key=lambda trajectory: trajectory.rollout)
    filler.join()
    for pair in zip(found, backend.expected(asked, random_weights(MODEL, 1)), strict=True):
        assert_same_trajectory(*pair, tolerance=ROUNDING)
    engine.commit(1)
    expected = backend.expected(asked, random_weights(MODEL, 2), 1)
    for pair in zip(decode(engine, asked), expected, strict=True):
        assert_same_trajectory(*pair, tolerance=ROUNDING)


# Pushes into trajectories under way


def versions_of(trajectory: Trajectory) -> list[int]:
    return trajectory.weight_versions[trajectory.prompt_length :].tolist()


def push_under_way(engine: Engine, backend: Backend, num_told: int) -> list[Trajectory]:
    """Commit version 1 once ``num_told`` tokens of a tree were told; texts and trees run, some with
    listeners and some without. Whatever the policy, what is told is what is recorded.
    """
    backend.load(engine, random_weights(MODEL, 0), version=0)
    heard, unheard = trees(backend, 6)[:3] + texts(2), trees(backend, 6)[3:] + texts(2, first=200)
    replays = add_listening(engine, heard)
    for request, teacher in unheard:
        engine.add(request, teacher)
    finished = step_until(engine, lambda: len(replays[0].linear()) >= num_told)
    commit(engine, backend, seed=1, version=1)
    finished += drain(engine)
    ids = {request.request_id for request, _ in heard}
    assert_told(replays, [t for t in finished if f"p#{t.rollout}" in ids])
    assert len(finished) == len(heard) + len(unheard)
    assert {t.finish for t in finished} <= {FinishReason.STOP, FinishReason.LENGTH}
    assert any(1 in versions_of(t) for t in finished)
    return sorted(finished, key=lambda trajectory: trajectory.rollout)


def logprobs_given_the_text(
    finished: list[Trajectory], backend: Backend, version: int
) -> list[np.ndarray]:
    """Log-probs under the weights of ``version``, by one masked pass."""
    return backend.oracle(random_weights(MODEL, version)).score(finished)


def check_drop(engine: Engine, backend: Backend, finished: list[Trajectory]) -> None:
    """Each trajectory is of one version, and what that version writes from the prompt on."""
    by_id = {r.request_id: (r, t) for r, t in trees(backend, 6) + texts(2) + texts(2, first=200)}
    for trajectory in finished:
        (version,) = set(versions_of(trajectory))
        weights = random_weights(MODEL, version)
        (expected,) = backend.expected([by_id[f"p#{trajectory.rollout}"]], weights, version)
        assert_same_trajectory(trajectory, expected, tolerance=ROUNDING)


def check_recompute(engine: Engine, backend: Backend, finished: list[Trajectory]) -> None:
    """Each token has the log-prob of its version given the text."""
    if backend.config.backend == "embedded":  # SGLang goes on between two steps, maybe to the end
        assert sum(len(set(versions_of(t))) == 2 for t in finished) > len(finished) / 2
    for version in (0, 1):
        expected = logprobs_given_the_text(finished, backend, version)
        for trajectory, logprobs in zip(finished, expected, strict=True):
            mine = trajectory.weight_versions == version
            np.testing.assert_allclose(
                trajectory.logprobs[mine], logprobs[mine], atol=ROUNDING, rtol=0
            )


def check_keep(engine: Engine, backend: Backend, finished: list[Trajectory]) -> None:
    """Each token has the log-prob of a run whose steps had the recorded versions."""
    assert sum(len(set(versions_of(t))) == 2 for t in finished) > len(finished) / 2
    first, second = (logprobs_given_the_text(finished, backend, version) for version in (0, 1))
    is_other = False
    for trajectory, old, new in zip(finished, first, second, strict=True):
        early, late = trajectory.weight_versions == 0, trajectory.weight_versions == 1
        np.testing.assert_allclose(trajectory.logprobs[early], old[early], atol=ROUNDING, rtol=0)
        if early.any() and late.any():
            is_other |= bool(np.abs(trajectory.logprobs[late] - new[late]).max() > 100 * ROUNDING)
        if trajectory.mode is DecodeMode.SEQUENTIAL:
            assert_same_trajectory(replayed(trajectory, backend), trajectory, tolerance=ROUNDING)
    assert is_other, "old keys and values were read"


def replayed(trajectory: Trajectory, backend: Backend) -> Trajectory:
    """Decode a text alone, its tokens dictated, each step under the version of its token."""
    engine = tiny_engine(model=MODEL, vocabulary=backend.vocabulary, kv_after_push="keep")
    prompt_length = trajectory.prompt_length
    request = request_for(
        trajectory.token_ids[:prompt_length].tolist(),
        rollout=trajectory.rollout,
        mode=trajectory.mode,
        max_new_tokens=trajectory.num_tokens,
    )
    labels = trajectory.block[prompt_length:], trajectory.branch[prompt_length:]
    engine.add(request, teacher_of_labels(trajectory.response_ids, *labels))
    for version in versions_of(trajectory):
        if version != engine.weight_version:
            engine.load(random_weights(MODEL, version), version)
        if finished := engine.step():
            return finished[0]
    raise AssertionError("a replay takes as many steps as it has tokens")


CHECKS: dict[str, Callable[[Engine, Backend, list[Trajectory]], None]] = {
    "drop": check_drop,
    "recompute": check_recompute,
    "keep": check_keep,
}


@pytest.mark.parametrize("num_told", [1, 12, 20, 32, 45])
def test_a_push_leaves_what_its_policy_says(
    engine: Engine, backend: Backend, num_told: int
) -> None:
    finished = push_under_way(engine, backend, num_told)
    CHECKS[backend.config.kv_after_push](engine, backend, finished)


def test_many_pushes_into_one_batch(engine: Engine, backend: Backend) -> None:
    """Each token has a version, in order, and none that was live before the request came."""
    backend.load(engine, random_weights(MODEL, 0), version=0)
    replays = add_listening(engine, trees(backend, 4) + texts(4))
    finished: list[Trajectory] = []
    for version in range(1, 6):
        told = len(replays[-1].linear())
        finished += step_until(
            engine, lambda told=told: len(replays[-1].linear()) > told or not engine.num_unfinished
        )
        commit(engine, backend, seed=version, version=version)
    finished += drain(engine)
    assert_told(replays, finished)
    last = max(finished, key=lambda trajectory: trajectory.rollout)
    assert versions_of(last) == sorted(versions_of(last))
    if backend.config.backend == "embedded":  # SGLang goes on between two steps, maybe to the end
        assert versions_of(last)[-1] == 5
    if backend.config.kv_after_push == "drop":
        assert len(set(versions_of(last))) == 1
    if backend.config.kv_after_push == "recompute":
        for version in range(6):
            expected = logprobs_given_the_text(finished, backend, version)
            for trajectory, logprobs in zip(finished, expected, strict=True):
                mine = trajectory.weight_versions == version
                np.testing.assert_allclose(
                    trajectory.logprobs[mine], logprobs[mine], atol=ROUNDING, rtol=0
                )
