"""Live pushes under random faults: nothing mixed or stale is served, nothing hangs, nothing leaks.

Every seed is a case with real processes: trainer ranks that publish through shared memory, replicas
with engines that decode all the time, a coordinator; killed, stopped, delayed, short of room, with
flipped bits and orders out of order. Each trajectory must then be of one version, not older than
what the fleet served when it was asked for, with exactly the log-probs of that version.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from npr_megatron.records.trajectory import FloatArray, Trajectory
from tests.chaos.case import NUM_REPLICAS, Case, Seen
from tests.chaos.faults import Fault, Victim, blows_of
from tests.chaos.parts import MODEL, engine_weights
from tests.engines import tiny_engine
from tests.thorough import parts

NUM_SEEDS = 200
NUM_PARTS, NUM_USUAL = 10, 2
"""Tests that share the seeds, and how many of them every run sees."""


@pytest.mark.slow
@pytest.mark.parametrize("part", parts(NUM_PARTS, NUM_USUAL))
def test_no_fault_serves_mixed_or_stale_weights_or_hangs_or_leaks(part: int, tmp_path: Path):
    for seed in range(part, NUM_SEEDS, NUM_PARTS):
        seen = Case(tmp_path / str(seed), seed).run()
        try:
            check(seen)
        except AssertionError as error:
            raise AssertionError(f"seed {seed} under {seen.blows}") from error


def check(seen: Seen) -> None:
    serving = seen.swap.serving
    assert serving is not None
    assert all(seen.swap.is_routable(index) for index in range(NUM_REPLICAS))
    assert seen.files_left == []
    by_version: dict[int, list[Trajectory]] = {}
    for asked_at, trajectories in seen.decoded:
        for trajectory in trajectories:
            versions = set(trajectory.weight_versions[trajectory.prompt_length :].tolist())
            assert len(versions) == 1, f"{trajectory.prompt_id} mixes versions {versions}"
            (version,) = versions
            assert version >= asked_at, f"version {version} served, the fleet had {asked_at}"
            by_version.setdefault(version, []).append(trajectory)
    assert serving.version in by_version  # the fleet still decodes at the end
    for version, trajectories in by_version.items():
        assert largest_gap(version, trajectories) < 1e-5


def largest_gap(version: int, trajectories: list[Trajectory]) -> float:
    """Between the log-probs recorded and those of the weights of ``version``."""
    engine = tiny_engine(model=MODEL, weights=engine_weights(version))
    expected: list[FloatArray] = engine.score(trajectories)
    return max(
        float(np.abs(trajectory.logprobs - logprobs).max())
        for trajectory, logprobs in zip(trajectories, expected, strict=True)
    )


def test_another_version_has_other_logprobs(tmp_path: Path):
    seen = Case(tmp_path / "quiet", seed=quiet_seed()).run()
    check(seen)
    (_, trajectories), *_ = [found for found in seen.decoded if found[1]]
    version = int(trajectories[0].weight_versions[-1])
    assert largest_gap(version + 1, trajectories) > 0.01


def quiet_seed() -> int:
    """A case whose only blow is a short delay."""
    return next(
        seed
        for seed in range(10_000)
        if all(
            blow.fault is Fault.STOP and blow.victim is Victim.SOURCE and blow.lasting_s < 0.1
            for blow in blows_of(seed)
        )
    )


def test_the_seeds_cover_every_fault_on_every_victim():
    struck = Counter(
        (blow.fault, blow.victim) for seed in range(NUM_SEEDS) for blow in blows_of(seed)
    )
    kinds = [*((f, v) for f in (Fault.KILL, Fault.STOP) for v in Victim)]
    kinds += [(Fault.CORRUPT, Victim.SOURCE), (Fault.FULL, Victim.SOURCE)]
    assert min(struck[kind] for kind in [*kinds, (Fault.REORDER, Victim.COORDINATOR)]) >= 10
