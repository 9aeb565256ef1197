"""Arenas as files: reserved, owned, replaced when their owner is dead, swept when a run is."""

from __future__ import annotations

import os
import resource

import pytest
import torch

from npr_megatron.config.training import ParallelConfig
from npr_megatron.errors import EnvironmentFault, InputError
from npr_megatron.weights.executors.arena import OwnedArena, arena_bytes, arena_path, remove_arenas
from npr_megatron.weights.layouts import trainer_layout
from tests.unit.weights.oracles import tiny_model

SOURCE = trainer_layout(tiny_model(), ParallelConfig(tp_size=2, pp_size=2, dp_size=2))


def test_arena_takes_the_bytes_that_were_announced(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        path = arena_path(tmp_path, "size", 0)
        arena = OwnedArena(path, SOURCE.ranks[0], dtype)
        assert path.stat().st_size == arena_bytes(SOURCE.ranks[0], dtype)
        assert path.stat().st_blocks * 512 >= path.stat().st_size  # reserved, not sparse
        arena.close()


def test_living_owner_keeps_its_arena_and_a_dead_ones_is_replaced(tmp_path):
    path = arena_path(tmp_path, "run", 0)
    owner = OwnedArena(path, SOURCE.ranks[0], torch.float32)
    with pytest.raises(EnvironmentFault, match="belongs to a living process"):
        OwnedArena(path, SOURCE.ranks[0], torch.float32)
    assert remove_arenas(tmp_path, "run") == 0
    owner.close()

    child = os.fork()
    if child == 0:
        OwnedArena(path, SOURCE.ranks[0], torch.float32)
        os._exit(0)  # as a kill would: nothing is cleaned up
    assert os.waitpid(child, 0)[1] == 0
    assert path.exists()
    OwnedArena(path, SOURCE.ranks[0], torch.float32).close()
    assert not path.exists()


def test_arenas_of_a_dead_run_are_removed_and_those_of_others_are_not(tmp_path):
    for name in ("npr-run-rank00000.arena", "npr-run-rank00001.arena"):
        (tmp_path / name).write_bytes(b"left by a kill")
    for name in (
        "npr-run-rank-rank00000.arena",
        "npr-other-rank00000.arena",
        "npr-run-rank0.arena",
    ):
        (tmp_path / name).write_bytes(b"not of this run")
    assert remove_arenas(tmp_path, "run") == 2
    assert len(list(tmp_path.iterdir())) == 3


def test_too_little_room_is_an_error_that_says_how_much_is_needed(tmp_path):
    path = arena_path(tmp_path, "full", 0)
    needed = arena_bytes(SOURCE.ranks[0], torch.float32)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (needed // 2, limits[1]))
    try:
        with pytest.raises(EnvironmentFault, match=f"needs {needed} bytes"):
            OwnedArena(path, SOURCE.ranks[0], torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not path.exists()


def test_folder_that_does_not_exist_and_names_that_leave_it_are_refused(tmp_path):
    with pytest.raises(EnvironmentFault, match="cannot be created"):
        OwnedArena(arena_path(tmp_path / "absent", "run", 0), SOURCE.ranks[0], torch.float32)
    with pytest.raises(InputError, match="run id"):
        arena_path(tmp_path, "../run", 0)
