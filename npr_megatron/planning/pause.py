"""How long decoding stands still for a new version, by where the version waits until its commit."""

from __future__ import annotations

from dataclasses import dataclass

from npr_megatron.planning.cluster import HardwareConfig
from npr_megatron.planning.push_floor import GB


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """One way to hold the next version; the fleet's barrier comes on top of ``seconds``."""

    mode: str
    seconds: float
    gpu_bytes: int
    """Spare memory per GPU [bytes]."""
    host_bytes: int
    """Spare host memory per GPU [bytes]."""
    is_feasible: bool
    """Weights and spare memory fit the GPU together."""


def pauses(gpu_bytes: int, transfer_s: float, cluster: HardwareConfig) -> tuple[Pause, ...]:
    """Return the pause of each mode for GPUs that hold ``gpu_bytes`` of weights.

    ``in place`` receives into the served weights; ``shadow`` and ``kv pages`` receive into spare
    GPU memory and into pages taken from the KV cache, then copy; ``host`` waits in host memory;
    ``pointer flip`` serves the shadow itself, which breaks captured CUDA graphs.
    """
    copy_s = gpu_bytes / (cluster.device_copy_gb_per_s * GB)
    upload_s = gpu_bytes / (cluster.pcie_gb_per_s * GB)
    table = (
        ("in place", transfer_s, 0, 0),
        ("shadow", copy_s, gpu_bytes, 0),
        ("kv pages", copy_s, gpu_bytes, 0),
        ("host", upload_s, 0, gpu_bytes),
        ("pointer flip", 0.0, gpu_bytes, 0),
    )
    memory = cluster.gpu_memory_gb * GB
    return tuple(
        Pause(
            mode=mode,
            seconds=seconds,
            gpu_bytes=spare,
            host_bytes=host,
            is_feasible=gpu_bytes + spare <= memory,
        )
        for mode, seconds, spare, host in table
    )
