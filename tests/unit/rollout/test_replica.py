"""One replica with its loop at work: pushes while it decodes, void orders, loans, a long life."""

from __future__ import annotations

import dataclasses
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from npr_megatron.config.engine import EngineConfig
from npr_megatron.config.model import InitConfig
from npr_megatron.engine.embedded import EmbeddedEngine
from npr_megatron.errors import DivergenceError, StaleWeightsError
from npr_megatron.records.trajectory import DecodeMode, Trajectory
from npr_megatron.rollout.courier import stamp_of
from npr_megatron.rollout.health import Stamp
from npr_megatron.rollout.replica import Replica, ReplicaSpec
from npr_megatron.weights.checkpoints.hf import random_init
from npr_megatron.weights.executors.inproc import execute
from npr_megatron.weights.executors.shared_memory import Publisher
from npr_megatron.weights.layouts import canonical_layout, engine_layout
from npr_megatron.weights.plans.plan import plan_transfer
from npr_megatron.weights.publication import Publication
from tests.engines import TINY, request_for
from tests.structures import SMALL

NUM_PUSHES = 100
SOURCE, ENGINE = canonical_layout(TINY), engine_layout(TINY)
PLAN = plan_transfer(SOURCE, ENGINE)
Weights = Mapping[str, torch.Tensor]


def weights_of(version: int) -> dict[str, torch.Tensor]:
    return random_init(TINY, InitConfig(embedding_std=0.5), version)


class Source:
    """A trainer of one rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.publisher = Publisher(SOURCE, 0, torch.float32, run_id="source", arena_dir=folder)

    def publish(self, version: int, weights: Weights | None = None) -> Publication:
        given = weights_of(version) if weights is None else weights
        return Publication.assemble([self.publisher.publish(version, given)])


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    source = Source(tmp_path)
    yield source
    source.publisher.close()


def replica_with(**engine: object) -> Replica:
    config = EngineConfig.model_validate({"num_kv_slots": 4096, **engine})
    replica = Replica(
        ReplicaSpec(model=TINY, engine=config, vocabulary=SMALL, source=SOURCE, device="cpu")
    )
    replica.start()
    return replica


def push(replica: Replica, publication: Publication, term: int = 0) -> int:
    return replica.commit(replica.stage(publication, term), term)


def fed(replica: Replica, count: int, first: int, max_new_tokens: int) -> None:
    replica.submit(
        [
            request_for(
                (20, 21 + number % 5),
                prompt_id=f"p{number % 5}",
                rollout=number,
                mode=DecodeMode.SEQUENTIAL,
                seed=number,
                max_new_tokens=max_new_tokens,
            )
            for number in range(first, first + count)
        ]
    )


def decode_while_pushing(
    replica: Replica, source: Source, max_new_tokens: int
) -> tuple[list[Trajectory], list[int]]:
    """Push a hundred times into a loop that has work all the time.

    Returns:
        What was decoded, and for each push the steps that passed before its commit was carried out.
    """
    finished: list[Trajectory] = []
    waited, submitted = [], 0
    push(replica, source.publish(0))
    for version in range(1, NUM_PUSHES + 1):
        publication, steps = source.publish(version), -1
        while True:  # until decoding has gone on since the last push
            report = replica.report(0.001)
            finished += report.trajectories()
            if report.progress > steps >= 0:
                break
            steps = report.progress if steps < 0 else steps
            if submitted - len(finished) < 8:
                fed(replica, 8, submitted, max_new_tokens)
                submitted += 8
        waited.append(push(replica, publication))
    while len(finished) < submitted:
        finished += replica.report(1.0).trajectories()
    return finished, waited


def logprob_errors(finished: list[Trajectory], shift: int = 0) -> float:
    """Return the largest distance from the log-probs of each token's version plus ``shift``."""
    users = defaultdict(list)
    for trajectory in finished:
        for version in set(trajectory.weight_versions.tolist()) - {-1}:
            users[version].append(trajectory)
    oracle, worst = EmbeddedEngine(TINY, EngineConfig(), SMALL), 0.0
    for version, mine in users.items():
        storages = {name: torch.zeros_like(x) for name, x in oracle.weights.items()}
        execute(PLAN, {0: weights_of(version + shift)}, {0: storages})
        oracle.load(storages, version)
        for trajectory, expected in zip(mine, oracle.score(mine), strict=True):
            chosen = trajectory.weight_versions == version
            worst = max(worst, np.abs(trajectory.logprobs - expected)[chosen].max())
    return worst


@pytest.mark.parametrize("policy", ["drop", "recompute"])
def test_a_hundred_pushes_while_decoding_leave_every_token_with_one_version(
    source: Source, policy: str
) -> None:
    replica = replica_with(kv_after_push=policy, max_running=8)
    num_tokens = 4 if policy == "drop" else 200
    finished, waited = decode_while_pushing(replica, source, num_tokens)
    assert max(waited) <= 1  # the step that was being computed when the order came
    spread = [len(set(t.weight_versions.tolist()) - {-1}) for t in finished]
    assert max(spread) == 1 if policy == "drop" else max(spread) > 2
    assert logprob_errors(finished) <= 1e-5
    assert logprob_errors(finished, shift=1) > 1e-3


def test_only_what_is_staged_is_committed(source: Source) -> None:
    replica = replica_with()
    one = source.publish(1)
    with pytest.raises(StaleWeightsError, match="staged is None"):
        replica.commit(stamp_of(one), 0)
    stamp = replica.stage(one, 0)
    with pytest.raises(StaleWeightsError, match="staged is"):
        replica.commit(dataclasses.replace(stamp, digest=stamp.digest ^ 1), 0)
    replica.drop_staged(Stamp(1, 0))  # another one
    replica.commit(stamp, 0)
    with pytest.raises(StaleWeightsError, match="staged is None"):
        replica.commit(stamp, 0)
    stamp = replica.stage(source.publish(2), 0)
    replica.drop_staged(stamp)
    with pytest.raises(StaleWeightsError, match="staged is None"):
        replica.commit(stamp, 0)
    assert replica.settle().serving == stamp_of(one)


def test_settling_voids_every_order_given_before(source: Source) -> None:
    replica = replica_with()
    one, two = source.publish(1), source.publish(2)
    push(replica, one)
    stamp = replica.stage(two, 0)
    settled = replica.settle()
    assert settled.serving == stamp_of(one)
    for late in (lambda: replica.commit(stamp, 0), lambda: replica.stage(two, 0)):
        with pytest.raises(StaleWeightsError, match="void"):
            late()
    push(replica, two, settled.term)
    assert replica.settle().serving == stamp_of(two)


def test_settling_forgets_requests(source: Source) -> None:
    replica = replica_with(max_running=2)
    push(replica, source.publish(1))
    fed(replica, 8, 0, 200)
    replica.settle()
    assert replica.report(0.0).trajectories() == []
    fed(replica, 2, 0, 3)  # the same ids again
    assert sorted(t.rollout for t in replica.report(10.0).trajectories()) == [0, 1]


def served_bytes(replica: Replica, folder: Path) -> int:
    """The digest of what a replica serves, as a loan shows it."""
    digest = replica.lend("look", str(folder)).digest
    replica.end_loan("look")
    return digest


def test_weights_with_a_wrong_digest_or_nan_never_become_live(source: Source) -> None:
    replica = replica_with()
    one = source.publish(1)
    push(replica, one)
    forged = dataclasses.replace(source.publish(2), digest=5)
    with pytest.raises(StaleWeightsError, match="digest"):
        replica.stage(forged, 0)
    sick = weights_of(3)
    sick["model.norm.weight"][7] = float("nan")
    publication = source.publish(3, sick)
    with pytest.raises(DivergenceError, match=r"norm\.weight"):
        replica.stage(publication, 0)
    for refused in (stamp_of(forged), stamp_of(publication)):
        with pytest.raises(StaleWeightsError, match="staged is None"):
            replica.commit(refused, 0)
    assert replica.settle().serving == stamp_of(one)
    assert served_bytes(replica, source.folder) == one.digest


def test_a_newcomer_gets_from_a_peer_what_the_trainer_no_longer_has(source: Source) -> None:
    old, new = replica_with(), replica_with()
    publication = source.publish(4)
    push(old, publication)
    source.publisher.close()
    with pytest.raises(StaleWeightsError, match="cannot be read"):
        new.stage(publication, 0)
    loan = old.lend("peer-1", str(source.folder))
    assert stamp_of(loan) == stamp_of(publication)
    assert loan.arena_paths != publication.arena_paths
    push(new, loan)
    old.end_loan("peer-1")
    assert list(source.folder.iterdir()) == []
    assert new.settle().serving == stamp_of(publication)
    answers = []
    for replica in (old, new):
        fed(replica, 3, 0, 20)
        answers.append({t.rollout: t for t in replica.report(10.0).trajectories()})
    for rollout in range(3):
        one, other = answers[0][rollout], answers[1][rollout]
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.weight_versions, other.weight_versions)


def test_nothing_is_lent_before_anything_is_served(source: Source) -> None:
    replica = replica_with()
    with pytest.raises(StaleWeightsError, match="has none"):
        replica.lend("early", str(source.folder))
    assert [path for path in source.folder.iterdir() if "early" in path.name] == []


def test_requests_before_the_first_push_are_refused_and_leave_the_replica_well(
    source: Source,
) -> None:
    replica = replica_with()
    with pytest.raises(StaleWeightsError, match="holds no weights"):
        fed(replica, 2, 0, 4)
    push(replica, source.publish(1, weights_of(0)))
    fed(replica, 2, 0, 4)
    assert len(replica.report(30.0).trajectories()) == 2


def held(folder: Path) -> tuple[int, int, int]:
    """Open files, threads, and files in ``folder``."""
    process = psutil.Process()
    return process.num_fds(), threading.active_count(), len(list(folder.iterdir()))


def test_a_thousand_pushes_leave_nothing_behind(source: Source) -> None:
    replica, process = replica_with(max_running=4), psutil.Process()
    weights = [weights_of(0), weights_of(1)]
    version, marks = 0, []
    for _ in range(4):
        for _ in range(250):
            version += 1
            push(replica, source.publish(version, weights[version % 2]))
            if version % 10 == 0:
                fed(replica, 1, version, 2)
                replica.report(10.0)
            if version % 50 == 0:
                served_bytes(replica, source.folder)
        marks.append((process.memory_info().rss, held(source.folder)))
    assert replica.settle().serving is not None
    (_, first), *_, (_, last) = marks
    assert last == first
    assert marks[-1][0] - marks[1][0] < 8 << 20
