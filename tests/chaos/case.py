"""One case: start everybody, let the blows fall, replace the dead, collect what was seen."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from npr_megatron.records.trajectory import Trajectory
from npr_megatron.rollout.push import Swap
from npr_megatron.weights.executors.arena import arena_path, sweep_dead_arenas
from tests.chaos.coordinator import coordinator_process
from tests.chaos.faults import Blow, Fault, Victim, blows_of
from tests.chaos.lines import Gone, Late, call, until
from tests.chaos.parts import (
    NUM_SOURCES,
    RUN_ID,
    replica_address,
    replica_process,
    source_address,
    source_process,
)
from tests.distributed.harness import forks

NUM_REPLICAS = 2
NUM_PUSHES = 3
_START_S = 60.0
_CASE_S = 60.0
"""Beyond the coordinator's own deadline: nobody may outlive it."""
_NO_ROOM = 4096


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a case left behind."""

    blows: list[Blow]
    swap: Swap
    decoded: list[tuple[int, list[Trajectory]]]
    """Trajectories with the version that the fleet served when they were asked for."""
    files_left: list[str]
    """In the arenas' folder, after the dead were swept."""


class Case:
    """The processes of one case."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._seed = seed
        self._blows = blows_of(seed)
        self._chance = random.Random(seed)
        self._processes: dict[tuple[Victim, int], BaseProcess] = {}
        self._wakings: list[tuple[float, int]] = []
        """When which stopped process goes on."""
        self._num_coordinators = 0

    def run(self) -> Seen:
        """Live through the case; every process is gone when it returns."""
        (self._folder / "arenas").mkdir(parents=True)
        try:
            self._start_all()
            self._live()
        finally:
            for process in self._processes.values():
                process.kill()
                process.join()
        swap = pickle.loads((self._folder / "end").read_bytes())
        sweep_dead_arenas(self._folder / "arenas")
        return Seen(
            blows=self._blows,
            swap=swap,
            decoded=list(self._decoded()),
            files_left=[file.name for file in (self._folder / "arenas").iterdir()],
        )

    def _start_all(self) -> None:
        for rank in range(NUM_SOURCES):
            self._start(Victim.SOURCE, rank)
        for index in range(NUM_REPLICAS):
            self._start(Victim.REPLICA, index)
        addresses = [
            *(source_address(self._folder, rank) for rank in range(NUM_SOURCES)),
            *(replica_address(self._folder, index) for index in range(NUM_REPLICAS)),
        ]
        until(lambda: all(path.exists() for path in addresses), _START_S, "the first start")
        self._start(Victim.COORDINATOR, 0)

    def _start(self, who: Victim, index: int, file_limit: int = -1) -> None:
        context = forks()
        if who is Victim.SOURCE:
            process = context.Process(target=source_process, args=(index, self._folder, file_limit))
        elif who is Victim.REPLICA:
            process = context.Process(target=replica_process, args=(index, self._folder))
        else:
            self._num_coordinators += 1
            is_reordering = any(blow.fault is Fault.REORDER for blow in self._blows)
            seed = self._seed * 100 + self._num_coordinators
            process = context.Process(
                target=coordinator_process,
                args=(self._folder, NUM_REPLICAS, NUM_PUSHES, seed, is_reordering),
            )
        process.start()
        self._processes[who, index] = process

    def _live(self) -> None:
        """Strike, wake and replace until the coordinator has ended."""
        until((self._folder / "version").exists, _START_S, "the first push")
        started = time.monotonic()
        coming = list(self._blows)
        coordinator = (Victim.COORDINATOR, 0)
        while self._processes[coordinator].exitcode != 0:
            now = time.monotonic()
            broken = [key for key, one in self._processes.items() if (one.exitcode or 0) > 0]
            if now - started > _CASE_S or broken:
                raise AssertionError(f"seed {self._seed}, {broken} broke or hung: {self._blows}")
            while coming and coming[0].at_s <= now - started:
                self._strike(coming.pop(0), now)
            for waking in [waking for waking in self._wakings if waking[0] <= now]:
                self._wakings.remove(waking)
                _signal(waking[1], signal.SIGCONT)
            for who, index in [key for key, one in self._processes.items() if one.exitcode]:
                self._start(who, index)
            time.sleep(0.002)

    def _strike(self, blow: Blow, now: float) -> None:
        counts = {Victim.SOURCE: NUM_SOURCES, Victim.REPLICA: NUM_REPLICAS, Victim.COORDINATOR: 1}
        index = blow.index % counts[blow.victim]
        process = self._processes[blow.victim, index]
        assert process.pid is not None
        if blow.fault is Fault.KILL:
            process.kill()
        elif blow.fault is Fault.STOP:
            _signal(process.pid, signal.SIGSTOP)
            self._wakings.append((now + blow.lasting_s, process.pid))
        elif blow.fault is Fault.CORRUPT:
            self._flip_a_bit(arena_path(self._folder / "arenas", RUN_ID, index))
        elif blow.fault is Fault.FULL:
            process.kill()
            process.join()
            self._start(Victim.SOURCE, index, file_limit=_NO_ROOM)
            address = source_address(self._folder, index)
            # room comes back after a while, or the trainer could never publish again
            self._lift_limit_of(address)

    def _lift_limit_of(self, address: Path) -> None:
        deadline = time.monotonic() + _CASE_S
        while time.monotonic() < deadline:
            try:
                time.sleep(0.05)
                return call(address, "limit_files", -1, timeout_s=1.0)
            except (Gone, Late):
                continue
        raise AssertionError("the restarted trainer rank does not answer")

    def _flip_a_bit(self, arena: Path) -> None:
        if not arena.exists():
            return
        with arena.open("r+b", buffering=0) as file:
            place = self._chance.randrange(max(1, arena.stat().st_size))
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1 << self._chance.randrange(8)]))

    def _decoded(self) -> Iterator[tuple[int, list[Trajectory]]]:
        for path in sorted(self._folder.glob("trajectories-*")):
            with path.open("rb") as file:
                while True:
                    try:
                        yield _load(file)
                    except (EOFError, pickle.UnpicklingError):
                        break  # a killed coordinator stops in the middle of a word


def _load(file: Any) -> tuple[int, list[Trajectory]]:
    return pickle.load(file)


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # killed by another blow meanwhile
        os.kill(pid, number)
