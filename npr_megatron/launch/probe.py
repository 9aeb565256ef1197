"""Facts about this machine, gathered without judging them. ``launch.preflight`` judges."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from npr_megatron.config.run import RunConfig


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that a run needs."""

    path: str
    problem: str = ""
    """Why nothing can be written there; empty when it can."""
    free_bytes: int = 0
    device: int = -1
    """File system it is on; folders on one file system share their room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a run may need to know about the machine it is about to start on."""

    port_problem: str = ""
    """Why the asked port cannot be taken; empty when it can, or when none was asked for."""
    arena: Folder
    object_store: Folder
    output: Folder
    gpus: tuple[str, ...] | None = None
    """Names of the GPUs the driver shows; None when nobody asked."""
    gpu_problem: str = ""
    """Why the driver cannot be asked."""


def gather_facts(run: RunConfig) -> Facts:
    """Look at what ``run`` needs. Changes nothing; takes the port for a moment, to see that it is
    free."""
    cluster = run.cluster
    is_private = cluster.ray_address is None
    gpus, gpu_problem = None, ""
    if is_private and (cluster.gpus_per_trainer or cluster.gpus_per_replica):
        gpus, gpu_problem = _gpus()
    return Facts(
        port_problem=_port_problem(cluster.ray_port) if is_private and cluster.ray_port else "",
        arena=_folder(cluster.arena_dir),
        object_store=_folder("/dev/shm"),
        output=_folder(_nearest(run.run.output_dir)),
        gpus=gpus,
        gpu_problem=gpu_problem,
    )


def _port_problem(port: int) -> str:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Ray binds it
        try:
            probe.bind(("", port))
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, "") + f" {error.strerror}"
    return ""


def _folder(path: str) -> Folder:
    if not Path(path).is_dir():
        return Folder(path, problem="no such folder")
    if not os.access(path, os.W_OK | os.X_OK):
        return Folder(path, problem="not writable")
    room = os.statvfs(path)
    return Folder(path, free_bytes=room.f_bavail * room.f_frsize, device=os.stat(path).st_dev)


def _nearest(path: str) -> str:
    """Return ``path`` or the nearest parent that exists: where the missing folders would be
    made."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return str(folder)


def _gpus() -> tuple[tuple[str, ...], str]:
    try:
        import pynvml  # pyright: ignore[reportMissingImports]  (an extra)
    except ModuleNotFoundError:
        return (), "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return (), f"the NVIDIA driver does not answer ({error})"
    try:
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        return tuple(str(pynvml.nvmlDeviceGetName(handle)) for handle in handles), ""
    finally:
        pynvml.nvmlShutdown()
