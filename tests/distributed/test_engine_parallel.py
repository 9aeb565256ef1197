"""One engine over several processes: the tokens and log-probs of one process, weights that change
on all ranks or on none.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from npr_megatron.engine.compute.ranks import Ranks
from npr_megatron.engine.compute.runner import LocalRunner
from npr_megatron.engine.compute.tensor_parallel import Follower, LeaderRunner
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.errors import DivergenceError, StaleWeightsError
from npr_megatron.records.trajectory import FinishReason
from tests.distributed.engine_ranks import CPU, FP8, add_requests, config_of, fill, ranks_of
from tests.distributed.harness import run_ranks
from tests.engines import EXPERTS, TINY, UNTIED
from tests.structures import SMALL

STEPS_PER_PUSH = 8


def drain_with_pushes(engine, push):
    """Decode all; before every eighth step, ``push`` the next version into the engine."""
    finished, version, num_steps = [], 1, 0
    while engine.num_unfinished:
        if num_steps % STEPS_PER_PUSH == STEPS_PER_PUSH - 1:
            version += 1
            push(version)
        finished += engine.step()
        num_steps += 1
    return sorted(finished, key=lambda t: (t.prompt_id, t.rollout))


def decode_alone(model, weights):
    """The oracle: the same work by an engine of one process."""
    torch.set_num_threads(1)
    config = config_of(weights)
    engine = EmbeddedEngine(model, config, SMALL)

    def push(version):
        fill(engine.staging(), model, config, version)
        engine.commit(version)

    push(1)
    add_requests(engine)
    finished = drain_with_pushes(engine, push)
    return finished, engine.score(finished)


def commit_when_staged(engine, version):
    """Commit ``version`` at this step, however long the others take to stage it."""
    for _ in range(1000):
        try:
            return engine.commit(version)
        except StaleWeightsError:
            time.sleep(0.01)
    raise AssertionError(f"nobody staged version {version}")


def stage_while_following(follower, fill_version):
    """Follow; another thread stages each next version as soon as one is live."""

    def stage_on():
        staged = 0
        while not has_ended.is_set():
            if staged == max(follower.weight_version, 0):
                staged += 1
                fill_version(follower.staging(), staged)
                follower.seal(staged)
            time.sleep(0.001)

    has_ended = threading.Event()
    thread = threading.Thread(target=stage_on)
    thread.start()
    try:
        follower.follow()
    finally:
        has_ended.set()
        thread.join()


def decode_as_rank(rank, size, init_method, model, weights, kind=Ranks):
    """The same work as one of ``size`` ranks, each of which reads its shards for itself."""
    config = config_of(weights)

    def fill_version(storages, version):
        fill(storages, model, config, version, rank, size)

    with ranks_of(rank, size, init_method, kind=kind) as ranks:
        local = LocalRunner(model, config, CPU, ranks)
        if rank:
            follower = Follower(local, ranks)
            stage_while_following(follower, fill_version)
            return follower.weight_version
        leader = LeaderRunner(local, ranks)
        engine = EmbeddedEngine(model, config, SMALL, runner=leader)

        def push(version):
            fill_version(engine.staging(), version)
            engine.seal()
            commit_when_staged(engine, version)

        push(1)
        add_requests(engine)
        finished = drain_with_pushes(engine, push)
        scores = engine.score(finished)
        leader.close()
        return finished, scores, engine.weight_version


def assert_same(one, other):
    """Equal tokens, experts and versions, log-probs within 1e-5, decoded and scored."""
    for mine, expected in zip(one[0], other[0], strict=True):
        assert mine.token_ids.tolist() == expected.token_ids.tolist()
        assert mine.branch.tolist() == expected.branch.tolist()
        assert mine.weight_versions.tolist() == expected.weight_versions.tolist()
        np.testing.assert_array_equal(mine.routed_experts, expected.routed_experts)
        np.testing.assert_allclose(mine.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    for mine, expected in zip(one[1], other[1], strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5, rtol=0)


CASES = {
    "tp2": (2, TINY, "as_trained"),
    "tp4-kv-heads-twice": (4, UNTIED, "as_trained"),
    "tp2-fp8": (2, FP8, "fp8"),
    "tp2-experts": (2, EXPERTS, "as_trained"),
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_decode_what_one_process_does_through_pushes_while_decoding(case, tmp_path):
    size, model, weights = CASES[case]
    expected = decode_alone(model, weights)
    finished = expected[0]
    assert any(set(t.branch.tolist()) > {0, 1} for t in finished), "branches are decoded"
    if not model.tie_word_embeddings:
        assert {t.num_blocks for t in finished if t.finish is FinishReason.STOP} == {2}
    assert len({v for t in finished for v in t.weight_versions.tolist()} - {-1}) > 2
    assert all((t.routed_experts is not None) == (model.moe is not None) for t in finished)
    led, *followers = run_ranks(decode_as_rank, size, tmp_path, model, weights)
    assert_same(led[:2], expected)
    assert followers == [led[2]] * (size - 1), "all ranks ended with the same version"


class ForgetfulRanks(Ranks):
    """Leaves out one sum in each pass: that after the MLP of the last layer."""

    num_sums = 0

    def sum(self, partial):
        ForgetfulRanks.num_sums += 1
        is_last = ForgetfulRanks.num_sums % (1 + 2 * TINY.num_hidden_layers) == 0
        return partial if is_last else super().sum(partial)


def test_a_sum_left_out_shows(tmp_path):
    expected = decode_alone(TINY, "as_trained")
    led = run_ranks(decode_as_rank, 2, tmp_path, TINY, "as_trained", ForgetfulRanks)[0]
    with pytest.raises(AssertionError):
        assert_same(led[:2], expected)


PHASES = (
    # leader and follower: version, and whether with a NaN, or (None) begun anew once sealed;
    # what the leader's commit says
    ((1, False), None, StaleWeightsError),
    ((1, False), (1, False), None),
    ((2, False), (3, False), StaleWeightsError),
    ((2, False), (2, True), DivergenceError),
    ((2, True), (2, False), DivergenceError),
    ((2, False), (2, None), StaleWeightsError),
    ((1, False), (1, False), StaleWeightsError),  # live already
    ((2, False), (2, False), None),
)


def commit_phases_as_rank(rank, size, init_method):
    """Return per phase what the leader was told, and whether the live weights of this rank are
    those of the last version that was committed."""
    config, outcomes, live = config_of(), [], -1
    with ranks_of(rank, size, init_method) as ranks:
        local = LocalRunner(TINY, config, CPU, ranks)
        party = Follower(local, ranks) if rank else LeaderRunner(local, ranks)
        engine = None if rank else EmbeddedEngine(TINY, config, SMALL, runner=party)
        for leads, follows, error in PHASES:
            message = ""
            if rank:
                stage_phase(follows, config, party.staging, party.seal, rank, size)
                party.follow()
            else:
                stage_phase(leads, config, engine.staging, lambda _: engine.seal(), rank, size)
                try:
                    engine.commit(leads[0])
                except (StaleWeightsError, DivergenceError) as refusal:
                    assert type(refusal) is error
                    message = str(refusal)
                party.close()
            live = leads[0] if error is None else live
            version = party.weight_version if rank else engine.weight_version
            outcomes.append((message, version == live and holds(local, config, live, rank, size)))
    return outcomes


def stage_phase(what, config, staging, seal, rank, size):
    if what is None:
        return
    version, is_broken = what
    storages = staging()
    fill(storages, TINY, config, version, rank, size)
    if is_broken:
        storages["layers.1.o_proj.weight"][3, 2] = float("nan")
    try:
        seal(version)
    except DivergenceError:
        assert is_broken
    if is_broken is None:
        staging()


def holds(local, config, version, rank, size):
    expected = {name: torch.zeros_like(tensor) for name, tensor in local.weights.items()}
    if version >= 0:
        fill(expected, TINY, config, version, rank, size)
    return all(torch.equal(local.weights[name], tensor) for name, tensor in expected.items())


def test_a_version_is_taken_over_by_all_ranks_or_by_none(tmp_path):
    led, followed = run_ranks(commit_phases_as_rank, 2, tmp_path)
    assert [is_right for _, is_right in led + followed] == [True] * 2 * len(PHASES)
    messages = [message for message, _ in led]
    assert "ranks [1] have not staged and sealed it" in messages[0]
    assert "ranks [1] have not staged and sealed it" in messages[2]
    assert "ranks [1] staged NaN or infinity" in messages[3]
    assert "layers.1.o_proj.weight" in messages[4]
    assert "ranks [1] have not staged and sealed it" in messages[5]
    assert "over version 1" in messages[6]
    assert not messages[1] and not messages[7]
