"""Facts about this machine, gathered without judging them. ``launch.preflight`` judges."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from npr_megatron.config.run import RunConfig
from npr_megatron.runtime.fused_kernels import NOT_INSTALLED


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
    gpu_capabilities: tuple[tuple[int, int], ...] = ()
    """Compute capability of each, major and minor."""
    gpu_problem: str = ""
    """Why the driver cannot be asked."""
    without_transformer_engine: str = ""
    """Why TransformerEngine cannot be used, as far as files tell; empty where nobody asked."""


def gather_facts(run: RunConfig) -> Facts:
    """Look at what ``run`` needs. Changes nothing; takes the port for a moment, to see that it is
    free."""
    cluster = run.cluster
    is_private = cluster.ray_address is None
    gpus, capabilities, gpu_problem, without = None, (), "", ""
    if is_private and (cluster.gpus_per_trainer or cluster.gpus_per_replica):
        gpus, capabilities, gpu_problem = _gpus()
    if is_private and run.trainer.fp8 and find_spec("transformer_engine") is None:
        without = NOT_INSTALLED
    return Facts(
        port_problem=_port_problem(cluster.ray_port) if is_private and cluster.ray_port else "",
        arena=_folder(cluster.arena_dir),
        object_store=_folder("/dev/shm"),
        output=_folder(_nearest(run.run.output_dir)),
        gpus=gpus,
        gpu_capabilities=capabilities,
        gpu_problem=gpu_problem,
        without_transformer_engine=without,
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


def _gpus() -> tuple[tuple[str, ...], tuple[tuple[int, int], ...], str]:
    try:
        import pynvml  # pyright: ignore[reportMissingImports]  (an extra)
    except ModuleNotFoundError:
        return (), (), "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return (), (), f"the NVIDIA driver does not answer ({error})"
    try:
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        capabilities = [pynvml.nvmlDeviceGetCudaComputeCapability(handle) for handle in handles]
        names = tuple(str(pynvml.nvmlDeviceGetName(handle)) for handle in handles)
        return names, tuple((major, minor) for major, minor in capabilities), ""
    finally:
        pynvml.nvmlShutdown()
