"""Ray for one run: a private head on this machine, or a seat in a cluster that is already there.

Invariants: leaving the context, by Ctrl-C too, stops what it started and removes its folder. After
``kill -9`` of this process its reaper (``launch.reaper``) does the same within seconds. Ray carries
control and small batches only, so its object store is small. Nothing is printed: errors reach
people as exceptions, actors' own output stays in the logs of the session.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import ray
from ray._private import worker as ray_worker
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from npr_megatron.config.engine import ClusterConfig
from npr_megatron.errors import EnvironmentFault
from npr_megatron.launch import reaper
from npr_megatron.launch.placement import Need, Placement, require_room
from npr_megatron.rollout.actors import Seat

OBJECT_STORE_BYTES = 128 * 2**20
"""Room for a few batches in flight; Ray's minimum is 75 MiB."""
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # seats say which devices are visible
    "RAY_worker_niceness": "0",  # ranks and engines are the work, not a background job
    "RAY_prestart_worker_first_driver": "0",  # none of them could carry an actor of a seat
    "RAY_DEDUP_LOGS": "0",
}
_LONGEST_SOCKET_FOLDER = 40  # a unix socket path has 107 characters; Ray's own part takes up to 64
_READY_TIMEOUT_S = 120.0


class RayCluster:
    """Context manager: Ray is up, and every process of ``placement`` has a seat.

    Example::

        with RayCluster(run.cluster, place(run.parallel, run.fleet, run.cluster)) as cluster:
            trainers = TrainerGroup(cluster.trainer_seats, ...)
            fleet = Fleet(cluster.replica_seats, ...)

    Raises:
        ConfigError: a joined cluster has no node with room for the placement.
        EnvironmentFault: Ray does not come up, or this process already uses Ray.
    """

    trainer_seats: tuple[Seat, ...]
    replica_seats: tuple[Seat, ...]

    def __init__(self, config: ClusterConfig, placement: Placement) -> None:
        self._config = config
        self._placement = placement
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        if ray.is_initialized():
            raise EnvironmentFault(
                "a Ray cluster was asked for, this process already uses one; leave the first "
                "RayCluster first"
            )
        with ExitStack() as started:
            started.enter_context(_environment(_variables(self._config)))
            self._start_or_join(started)
            self._take_seats(started)
            self._exit = started.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()

    def _start_or_join(self, started: ExitStack) -> None:
        if self._config.ray_address is not None:
            started.callback(ray.shutdown)
            _init(self._config.ray_address, address=self._config.ray_address)
        else:
            started.enter_context(self._private_head())
        _silence_driver()

    def _private_head(self) -> ExitStack:
        """Start Ray on this machine; return what stops it.

        Ray gives its daemons 30 s, which a busy machine may exceed with cold files: try twice.
        """
        try:
            return self._start_head()
        except EnvironmentFault:
            return self._start_head()

    def _start_head(self) -> ExitStack:
        total = self._placement.total
        with ExitStack() as session:
            folder = _session_folder()
            session.enter_context(_reaped(folder))
            session.callback(ray.shutdown)
            _init(
                f"a private head, port {self._config.ray_port or 'any'}",
                # Logical: what the run needs, whatever the machine has.
                num_cpus=math.ceil(total.num_cpus),
                num_gpus=math.ceil(total.num_gpus),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
            )
            return session.pop_all()

    def _take_seats(self, started: ExitStack) -> None:
        require_room(self._placement, _free_nodes())
        group = placement_group(self._placement.bundles, strategy="STRICT_PACK")
        started.callback(_remove, group)
        if not group.wait(_READY_TIMEOUT_S):
            total = self._placement.total
            raise EnvironmentFault(
                f"a node with {total.num_cpus:g} CPUs and {total.num_gpus:g} GPUs was asked of Ray "
                "and not given "
                f"within {_READY_TIMEOUT_S:g} s; other jobs hold them: wait for them or ask for "
                "less"
            )
        needs = (*self._placement.trainers, *self._placement.replicas)
        seats = tuple(
            Seat(group, bundle, need.num_cpus, need.num_gpus) for bundle, need in enumerate(needs)
        )
        self.trainer_seats = seats[: len(self._placement.trainers)]
        self.replica_seats = seats[len(self._placement.trainers) :]


def _init(where: str, **arguments: Any) -> None:
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)
    except Exception as error:
        raise EnvironmentFault(
            f"Ray was asked for at {where} and did not come up: {error}; check that the address is "
            "reachable or the port free, and that /dev/shm has room"
        ) from error


def _free_nodes() -> list[Need]:
    """Return the resources of each live node (of all jobs together: what is taken is waited
    for)."""
    return [
        Need(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def _variables(config: ClusterConfig) -> dict[str, str]:
    if config.ray_address is None and config.ray_port is not None:
        return {**_ENVIRONMENT, "RAY_GCS_SERVER_PORT": str(config.ray_port)}
    return _ENVIRONMENT


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables that Ray's daemons inherit; restore what was there on exit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _session_folder() -> Path:
    """Return a new folder whose path is short enough for the sockets Ray puts into it."""
    parent = os.path.realpath(tempfile.gettempdir())
    if len(parent) + len("/npr-12345678") > _LONGEST_SOCKET_FOLDER:
        parent = "/tmp"
    return Path(tempfile.mkdtemp(prefix="npr-", dir=parent))


@contextmanager
def _reaped(folder: Path) -> Iterator[None]:
    """Have what still writes below ``folder`` killed, and the folder removed, on every way out."""
    command = [sys.executable, "-I", reaper.__file__, str(folder), str(os.getpid())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    try:
        yield
    finally:
        process.stdin.close()
        process.wait()  # the reaper has its own deadline


def _remove(group: PlacementGroup) -> None:
    if ray.is_initialized():
        remove_placement_group(group)


def _silence_driver() -> None:
    """Keep Ray's notices of dead workers off stdout, where they would break tables and JSON.

    ``log_to_driver`` does not cover them; Ray's own debugger uses the same switch. Deaths reach
    people as exceptions or as replaced replicas.
    """
    ray_worker._worker_logs_enabled = False
