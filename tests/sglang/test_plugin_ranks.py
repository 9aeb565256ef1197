"""The same stages on two tensor-parallel ranks, and without overlap."""

from __future__ import annotations

import random

import pytest

from tests.sglang.stages import (
    NUM_SLOTS,
    StageServer,
    go_on,
    new_trails,
    open_block,
    tell_apart,
)


@pytest.mark.slow
def test_two_ranks_without_overlap_decode_what_the_reference_does(
    model_folder, reference, monkeypatch
):
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("SGLANG_ENABLE_RANK_CONSENSUS_CHECKER", "1")
    options = {"tp_size": 2, "disable_overlap_schedule": True}
    with StageServer.started(model_folder, **options) as server:
        rng = random.Random(21)
        trails = new_trails(3, rng, "ranks")
        for _ in range(3):
            go_on(server, trails, rng)
            open_block(server, trails, rng)
        server.occupy(2 * NUM_SLOTS)
        go_on(server, trails, rng)
        num_wrong, worst = tell_apart(reference, trails)
    assert num_wrong == 0
    assert worst < 1e-5
