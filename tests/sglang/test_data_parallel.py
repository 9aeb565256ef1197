"""Two data-parallel ranks of SGLang in one engine: each has trajectories of its own, and both have
the same weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import psutil
import pytest

from npr_megatron.config.engine import SglangConfig
from npr_megatron.engine.sglang.engine import SglangEngine
from npr_megatron.errors import EngineLost
from npr_megatron.records.trajectory import DecodeMode, FinishReason
from tests.engines import (
    UNTIED,
    drain,
    random_weights,
    request_for,
    step_until,
)
from tests.sglang import beside
from tests.sglang.test_engine import (
    CONFIG,
    WEIGHTS,
    asked,
    assert_all_end,
    assert_equal,
    descendants,
    storages,
)
from tests.structures import SMALL

OTHERS = random_weights(UNTIED, 1)


@pytest.fixture(scope="module")
def started() -> Iterator[SglangEngine]:
    config = CONFIG.model_copy(update={"sglang": SglangConfig(dp_size=2), "backend": "sglang"})
    engine = SglangEngine(UNTIED, config, SMALL)
    engine.load(storages(WEIGHTS))
    yield engine
    engine.close()


@pytest.fixture
def ranks_of(engine: SglangEngine, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int | None]]:
    """The ranks that the stages of each trajectory were sent to, while the test runs."""
    ranks: dict[str, list[int | None]] = defaultdict(list)
    send = engine._server.ask

    def ask(number, stage, interval, rank) -> None:
        ranks[stage.trajectory].append(rank)
        send(number, stage, interval, rank)

    monkeypatch.setattr(engine._server, "ask", ask)
    return ranks


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}], ids=["greedy", "sampled"])
def test_each_trajectory_stays_on_its_rank_and_is_what_one_rank_writes(engine, ranks_of, options):
    several = asked(30 + len(options), count=6, **options)
    before = engine.stats()
    for request, teacher in several:
        engine.add(request, teacher)
    assert_equal(drain(engine), several)
    own = {name: ranks for name, ranks in ranks_of.items() if name != "nobody"}
    assert len(own) == 6
    assert max(map(len, own.values())) >= 4, "branches, their seals and the joined trunk"
    for ranks in own.values():
        assert len(set(ranks)) == 1, "branches read keys and values of the trunk"
    assert sorted(ranks[0] for ranks in own.values()) == [0, 0, 0, 1, 1, 1]
    assert engine.stats().num_replayed_tokens == before.num_replayed_tokens


def test_a_push_reaches_both_ranks_with_trajectories_under_way(engine, ranks_of):
    several = asked(33, count=4, temperature=0.0)
    for request, teacher in several:
        engine.add(request, teacher, listener=lambda event: None)
    finished = engine.step() + engine.step()
    engine.load(storages(OTHERS), version=1)
    finished += drain(engine)
    assert {1} <= {int(v) for t in finished for v in t.weight_versions}
    one, other = engine._beside(beside.checksums)
    assert one == other
    engine.load(storages(WEIGHTS), version=0)
    assert engine._beside(beside.checksums)[1] != other
    again = asked(34, count=4, temperature=0.0)
    for request, teacher in again:
        engine.add(request, teacher)
    for trajectory in (answers := drain(engine)):
        assert set(trajectory.weight_versions.tolist()) == {-1, 0}
    assert_equal(answers, again)
    assert {rank for ranks in ranks_of.values() for rank in ranks} == {0, 1}


def test_an_abort_ends_those_it_names_on_whatever_rank(engine):
    for _ in range(5):  # on a busy machine they may all have ended before the abort
        reasons = reasons_when_all_but_the_last_are_aborted(engine)
        if FinishReason.LENGTH not in reasons[:3]:
            break
    assert reasons == [FinishReason.ABORTED] * 3 + [FinishReason.LENGTH]


def reasons_when_all_but_the_last_are_aborted(engine: SglangEngine) -> list[FinishReason]:
    """Return why four long texts ended of which three were aborted, in their order."""
    for rollout in range(4):
        request = request_for([20, 21], rollout=rollout, mode=DecodeMode.SEQUENTIAL)
        engine.add(request, lambda *place: 25, listener=lambda event: None)
    finished = engine.step()
    for name in {"p#0", "p#1", "p#2"} & set(engine.unfinished):
        engine.abort(name)
    finished += drain(engine)
    return [t.finish for t in sorted(finished, key=lambda t: t.rollout)]


def test_a_dead_rank_is_told_and_nothing_is_left(started):
    started.add(request_for([20], mode=DecodeMode.SEQUENTIAL), lambda *place: 25)
    processes = descendants(started.host_pid)
    schedulers = [process for process in processes if "scheduler" in process.name()]
    assert len(schedulers) == 2
    max(schedulers, key=psutil.Process.create_time).kill()
    with pytest.raises(EngineLost, match=r"scheduler process \d+ has ended"):
        step_until(started, lambda: False, within_s=60.0)
    assert_all_end(processes)
