"""A push chunk by chunk: NICs, NVLink, relay chains, jitter, slow and dead nodes.

Every link and node is a queue that serves chunks in order, so a chain is an exact recurrence,
evaluated for all chunks of a node at once: ``finish[k] = max(ready[k], finish[k - 1]) + cost[k]``.
Rails of a node behave alike and count as one. Receivers buffer without limit; switches do not
block. Same seed, same result. Deliberately uses none of the closed forms' times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npr_megatron.planning.cluster import HardwareConfig
from npr_megatron.planning.conditions import Conditions
from npr_megatron.planning.push_floor import GB, best_chunks, hop_cost
from npr_megatron.planning.push_volume import NodeKind, PushVolume
from npr_megatron.planning.relays import count_roots, lay_chains

_DIRECT_CHUNK = 2e6
"""About what a source sends to one node at a time [bytes]."""
_MAX_CHUNKS = 1 << 20

Times = npt.NDArray[np.float64]
"""One time [s] per chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedPush:
    """How a push went."""

    finish_s: tuple[float, ...]
    """When each node of the fleet held everything [s]; infinite if it died before."""
    chunk_bytes: float
    """Largest chunk on one NIC [bytes]."""
    depth: int
    """Nodes of the longest chain; 1 without relays."""

    @property
    def seconds(self) -> float:
        """When the last living node was done; 0 if none lives."""
        return max((time for time in self.finish_s if math.isfinite(time)), default=0.0)


def simulate_relay(
    volume: PushVolume,
    cluster: HardwareConfig,
    conditions: Conditions | None = None,
    max_depth: int | None = None,
) -> SimulatedPush:
    """Return how a push along relay chains goes, each kind of node on chains of its own."""
    found = conditions or Conditions()
    roots = count_roots(volume, cluster.gpus_per_node, max_depth)
    source_s = max(volume.root_egress(roots)) / (cluster.nic_gb_per_s * GB)
    finish = [math.inf] * volume.num_nodes
    chunk, depth = 0.0, 0
    for group, num_chains in zip(volume.groups, roots, strict=True):
        rates = _rates(group, found.slow)
        # half-empty nodes are known to have fewer NICs, whatever was measured
        known = rates if found.are_rates_known else _rates(group, {})
        nodes = sorted(node for kind in group for node in kind.nodes)
        chains = lay_chains(nodes, num_chains, known)
        rails = _Rails(group, cluster, source_s, chains.depth, rates)
        chunk, depth = max(chunk, rails.chunk_bytes), max(depth, chains.depth)
        for chain in chains.chains:
            for node, time in zip(chain, _run_chain(chain, rails, found), strict=True):
                finish[node] = time
    return SimulatedPush(finish_s=tuple(finish), chunk_bytes=chunk, depth=depth)


def simulate_direct(
    volume: PushVolume, cluster: HardwareConfig, conditions: Conditions | None = None
) -> SimulatedPush:
    """Return how a push goes in which every source sends to every node itself.

    Each source sends one chunk per node and round, and begins at a node of its own.
    """
    found = conditions or Conditions()
    kind_of = {node: kind for kind in volume.kinds for node in kind.nodes}
    nodes = sorted(kind_of)
    sent = np.array([kind_of[node].bytes_from for node in nodes], dtype=np.float64).T
    num_rounds = _rounds(float(sent.max()), sent.size)
    arrivals = _send(sent / num_rounds, num_rounds, nodes, cluster, found)
    finish = [math.inf] * len(nodes)
    for place, node in enumerate(nodes):
        kind = kind_of[node]
        # a chunk of a small message is small: what a node takes in follows the bytes of each
        sizes = np.repeat(sent[:, place] / num_rounds, num_rounds)
        times = arrivals[:, :, place].ravel()
        order = np.argsort(times, kind="stable")
        rate = cluster.nic_gb_per_s * GB * kind.num_nics * found.slow.get(node, 1.0)
        done = _absorb(times[order], sizes[order] / rate)
        share = kind.nvlink_bytes / max(1.0, float(kind.node_bytes))
        done = _absorb(done, sizes[order] * share / (cluster.nvlink_gb_per_s * GB))
        if done[-1] <= found.deaths.get(node, math.inf):
            finish[node] = float(done[-1])
    return SimulatedPush(
        finish_s=tuple(finish), chunk_bytes=float(sent.max()) / num_rounds, depth=1
    )


def _rates(group: Sequence[NodeKind], slow: Mapping[int, float]) -> dict[int, float]:
    """Return the rate of each node of a group as a share of that of its first kind's nodes."""
    return {
        node: slow.get(node, 1.0) * kind.num_nics / group[0].num_nics
        for kind in group
        for node in kind.nodes
    }


class _Rails:
    """The links between nodes of a group, and the chunks that each rail of a chain carries."""

    def __init__(
        self,
        group: Sequence[NodeKind],
        cluster: HardwareConfig,
        source_s: float,
        depth: int,
        rates: Mapping[int, float],
    ) -> None:
        kind = group[0]
        num_chunks = math.ceil(best_chunks(kind, cluster, depth, source_s))
        self.chunk_bytes = kind.node_bytes / kind.num_nics / num_chunks
        self.num_chunks = num_chunks
        self.nvlink_s = {
            node: kind.nvlink_bytes / num_chunks / (cluster.nvlink_gb_per_s * GB)
            for kind in group
            for node in kind.nodes
        }
        """A chunk from those GPUs of a node that received it to the others."""
        self._hop_s = hop_cost(cluster)
        self._wire_s = self.chunk_bytes / (cluster.nic_gb_per_s * GB)
        # the source's NICs feed all chains at once
        self._source_s = max(self._wire_s, source_s / num_chunks)
        self._rates = rates

    def costs(self, node: int, parent: int | None, found: Conditions) -> Times:
        """Return what each chunk costs on the link from ``parent`` (None: the source) [s]."""
        rate = self._rates[node]
        if parent is None:
            # a slow receiver hides that the source is busy with others
            seconds = max(self._source_s, self._wire_s / rate)
        else:
            seconds = self._wire_s / min(rate, self._rates[parent]) + self._hop_s
        # the link's own stream: results do not depend on the order of evaluation
        key = [found.seed, node, 0 if parent is None else parent + 1]
        return seconds * _jitter(found.jitter, self.num_chunks, key)


def _run_chain(chain: Sequence[int], rails: _Rails, found: Conditions) -> list[float]:
    """Return when each node of a chain is done; infinite for those that die."""
    held: list[Times] = []
    done: list[float] = []
    for place, node in enumerate(chain):
        times = _receive(chain, place, held, rails, found)
        held.append(times)
        spread = _serve(times, np.full(len(times), rails.nvlink_s[node]))
        is_in_time = spread[-1] <= found.deaths.get(node, math.inf)
        done.append(float(spread[-1]) if is_in_time else math.inf)
    return done


def _receive(
    chain: Sequence[int], place: int, held: Sequence[Times], rails: _Rails, found: Conditions
) -> Times:
    """Return when each chunk reaches a node, from whichever ancestor lives.

    What a dying parent had not finished sending is sent anew by the next living ancestor.
    """
    times = np.full(rails.num_chunks, math.inf)
    num_received, earliest = 0, 0.0
    for ancestor in range(place - 1, -2, -1):
        parent = chain[ancestor] if ancestor >= 0 else None
        ready = held[ancestor] if ancestor >= 0 else np.zeros(rails.num_chunks)
        rest = slice(num_received, None)
        costs = rails.costs(chain[place], parent, found)[rest]
        arrivals = _serve(np.maximum(ready[rest], earliest), costs)
        death = math.inf if parent is None else found.deaths.get(parent, math.inf)
        num_alive = int(np.searchsorted(arrivals, death, side="right"))
        times[num_received : num_received + num_alive] = arrivals[:num_alive]
        num_received += num_alive
        if num_received == rails.num_chunks or death == math.inf:
            break
        earliest = max(earliest, death + found.detection_s)
    return times


def _rounds(largest_bytes: float, num_messages: int) -> int:
    """Return into how many chunks messages are cut: about 2 MB each, a million at the most."""
    return max(1, min(math.ceil(largest_bytes / _DIRECT_CHUNK), _MAX_CHUNKS // num_messages))


def _send(
    chunks: Times, num_rounds: int, nodes: Sequence[int], cluster: HardwareConfig, found: Conditions
) -> Times:
    """Return when each chunk has left its source [source, round, node].

    A source skips a node once its death is known; chunks on the way to it are lost.
    """
    num_sources, num_nodes = chunks.shape
    seconds = chunks / (cluster.nic_gb_per_s * GB)
    left = np.empty((num_sources, num_rounds, num_nodes))
    for source in range(num_sources):
        # neighbours begin at different nodes, so no node is sent to by all sources at once
        order = np.roll(np.arange(num_nodes), -(source * num_nodes // num_sources))
        costs = np.tile(seconds[source, order], num_rounds)
        costs *= _jitter(found.jitter, costs.size, [found.seed, source])
        target = np.tile(np.asarray(nodes)[order], num_rounds)
        for node, death in sorted(found.deaths.items(), key=lambda item: item[1]):
            starts = np.cumsum(costs) - costs
            costs[(target == node) & (starts >= death + found.detection_s)] = 0.0
        left[source][:, order] = np.cumsum(costs).reshape(num_rounds, num_nodes)
    return left


def _absorb(ready: Times, costs: Times) -> Times:
    """Return ``finish[k] = max(ready[k], finish[k - 1] + costs[k])``: served while arriving."""
    total = np.cumsum(costs)
    return total + np.maximum.accumulate(ready - total)


def _serve(ready: Times, costs: Times) -> Times:
    """Return ``finish[k] = max(ready[k], finish[k - 1]) + costs[k]``."""
    total = np.cumsum(costs)
    return total + np.maximum.accumulate(ready - (total - costs))


def _jitter(share: float, count: int, key: Sequence[int]) -> Times:
    """Return lognormal factors of mean 1 and standard deviation ``share``."""
    if share == 0:
        return np.ones(count)
    variance = math.log1p(share**2)
    normal = np.random.default_rng(key).standard_normal(count)
    return np.exp(math.sqrt(variance) * normal - variance / 2)
