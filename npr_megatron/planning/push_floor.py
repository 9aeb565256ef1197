"""Closed forms of a push: what no executor can beat, and what direct and relayed pushes take.

Floors use line rates, predictions measured ones. Pure arithmetic over a ``PushVolume``; nothing of
the simulation is used here, so each checks the other. Seconds, bytes, bytes/s throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from npr_megatron.planning.cluster import HardwareConfig
from npr_megatron.planning.push_volume import NodeKind, PushVolume
from npr_megatron.planning.relays import chain_length, count_roots

GB = 1e9
"""Rates of a cluster are in GB/s."""
_UNRELAYED_CHUNK = 8e6
"""Large enough for a NIC to reach its rate [bytes]."""
_SMALLEST_CHUNK = 4e6
"""What smaller chunks could still gain is not worth their number [bytes]."""
_BOUND_FRAC = 0.99
"""Resources that are busy for about as long as the busiest; the first of ``LIMITS`` is named."""
LIMITS = ("node ingress", "source egress", "NVLink", "relay chain")
"""What can bound a push, in the words of reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushTime:
    """How long a way of pushing takes, and why."""

    seconds: float
    bottleneck: str
    """One of ``LIMITS``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushFloor:
    """Lower bounds at line rate; a push that may relay takes at least ``seconds``."""

    node_ingress_s: float
    """The neediest node, through all its NICs."""
    gpu_fill_s: float
    """The fullest GPU, through its NIC and NVLink together."""
    nvlink_s: float
    """The fullest GPU, what its neighbours received for it."""
    source_egress_s: float
    """One replica out of all source NICs."""
    all_nics_s: float
    """All bytes, if source and fleet NICs sent all the time."""
    source_pack_s: float
    """One replica, packed or cast in the sources' memory."""

    @property
    def seconds(self) -> float:
        """The largest of them."""
        return max(
            self.node_ingress_s,
            self.gpu_fill_s,
            self.nvlink_s,
            self.source_egress_s,
            self.all_nics_s,
            self.source_pack_s,
        )


def push_floor(volume: PushVolume, cluster: HardwareConfig) -> PushFloor:
    """Return the lower bounds of a push on links at line rate."""
    nic, nvlink = cluster.nic_line_gb_per_s * GB, cluster.nvlink_gb_per_s * GB
    sources = volume.num_source_gpus
    return PushFloor(
        node_ingress_s=max(kind.node_bytes / kind.num_nics for kind in volume.kinds) / nic,
        gpu_fill_s=volume.gpu_bytes / (nic + nvlink),
        nvlink_s=max(kind.nvlink_bytes for kind in volume.kinds) / nvlink,
        source_egress_s=volume.model_bytes / (sources * nic),
        all_nics_s=volume.wire_bytes / ((sources + volume.num_target_nics) * nic),
        source_pack_s=volume.model_bytes / (sources * cluster.device_copy_gb_per_s * GB),
    )


def direct_time(volume: PushVolume, cluster: HardwareConfig) -> PushTime:
    """Return the time of a push in which the source sends to every node itself.

    Grows with the fleet once the fleet has more NICs than the source.
    """
    return _longest(_stage_times(volume, cluster, volume.direct_egress()))


def relay_time(
    volume: PushVolume, cluster: HardwareConfig, max_depth: int | None = None
) -> PushTime:
    """Return the time of a push along chains of nodes, each forwarding what it has received.

    A chain of h nodes that need Q bytes over K NICs each takes, in m chunks per NIC,
    ``(m + h - 1) (Q / (m K b) + a)``; at the best m ``(sqrt(Q / (K b)) + sqrt((h - 1) a)) ** 2``,
    almost flat in the size of the fleet. Where the source or NVLink is slower than the first node's
    NICs, the chain hides in its time but for the last chunk's way.
    """
    roots = count_roots(volume, cluster.gpus_per_node, max_depth)
    stages = _stage_times(volume, cluster, volume.root_egress(roots))
    first = _longest(stages)
    hop_s = hop_cost(cluster)
    seconds = 0.0
    for group, num_chains in zip(volume.groups, roots, strict=True):
        num_hops = chain_length(group, num_chains) - 1
        num_chunks = best_chunks(group[0], cluster, num_hops + 1, stages["source egress"])
        slowest = max(_ingress(kind, cluster) for kind in group)
        paced = slowest + num_chunks * hop_s if num_hops else slowest
        last = num_hops * (_ingress(group[0], cluster) / num_chunks + hop_s)
        seconds = max(seconds, max(first.seconds, paced) + last)
    bottleneck = "relay chain" if seconds > 2 * first.seconds else first.bottleneck
    return PushTime(seconds=seconds, bottleneck=bottleneck)


def best_chunks(kind: NodeKind, cluster: HardwareConfig, depth: int, source_s: float) -> float:
    """Return into how many chunks to cut what each NIC of a chain's node receives.

    Many chunks pay the hops' cost often, few fill the chain slowly. While the source takes
    ``source_s`` [s], longer than a node, more chunks cost nothing. A chain of one node forwards
    nothing: its chunks only let NVLink begin before the NIC ends.
    """
    nic_bytes = kind.node_bytes / kind.num_nics
    if depth == 1:
        return max(1.0, nic_bytes / _UNRELAYED_CHUNK)
    ingress, hop_s = _ingress(kind, cluster), hop_cost(cluster)
    free = min((source_s - ingress) / hop_s, nic_bytes / _SMALLEST_CHUNK)
    return max(1.0, math.sqrt((depth - 1) * ingress / hop_s), free)


def hop_cost(cluster: HardwareConfig) -> float:
    """Return what forwarding a chunk costs beside its bytes [s]."""
    return cluster.hop_cost_us * 1e-6


def _stage_times(
    volume: PushVolume, cluster: HardwareConfig, egress: Sequence[int]
) -> dict[str, float]:
    """Return how long each resource is busy when sources send ``egress`` bytes."""
    nic = cluster.nic_gb_per_s * GB
    return {
        "node ingress": max(_ingress(kind, cluster) for kind in volume.kinds),
        "source egress": max(egress) / nic,
        "NVLink": max(kind.nvlink_bytes for kind in volume.kinds) / (cluster.nvlink_gb_per_s * GB),
    }


def _ingress(kind: NodeKind, cluster: HardwareConfig) -> float:
    return kind.node_bytes / kind.num_nics / (cluster.nic_gb_per_s * GB)


def _longest(times: dict[str, float]) -> PushTime:
    seconds = max(times.values())
    # a source as busy as the nodes but for the last row dealt bounds nothing
    name = next(name for name in times if times[name] >= _BOUND_FRAC * seconds)
    return PushTime(seconds=seconds, bottleneck=name)
