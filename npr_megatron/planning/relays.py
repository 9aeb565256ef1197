"""Who forwards to whom in a relayed push: chains of nodes, each fed by a trainer node.

Pure and deterministic: whoever knows the same nodes and rates lays the same chains. A chain, not a
tree: a node that feeds k children needs k times as long to send. A slow node delays all behind it,
so slow nodes come last; a dead node leaves its chain and its child continues from its grandparent.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from npr_megatron.planning.push_volume import NodeKind, PushVolume


@dataclass(frozen=True, slots=True)
class RelayChains:
    """Chains of node numbers; the first node of each is fed by the source."""

    chains: tuple[tuple[int, ...], ...]

    @property
    def depth(self) -> int:
        """Nodes of the longest chain."""
        return max((len(chain) for chain in self.chains), default=0)

    def parent(self, node: int) -> int | None:
        """Return who feeds ``node``; None: the source.

        Raises:
            KeyError: no chain has the node.
        """
        for chain in self.chains:
            if node in chain:
                place = chain.index(node)
                return chain[place - 1] if place else None
        raise KeyError(node)

    def without(self, dead: Collection[int]) -> RelayChains:
        """Return the chains after deaths: every orphan is fed by its nearest living ancestor."""
        living = (tuple(node for node in chain if node not in dead) for chain in self.chains)
        return RelayChains(tuple(chain for chain in living if chain))


def lay_chains(
    nodes: Sequence[int], num_chains: int, rates: Mapping[int, float] | None = None
) -> RelayChains:
    """Return ``nodes`` dealt into ``num_chains`` chains of equal length, the slowest nodes last.

    Args:
        nodes: all need the same bytes.
        rates: NIC rate of nodes as a share of the ordinary one; who is not named has 1.

    Example:
        ``lay_chains(range(5), 2, {0: 0.5})`` gives chains (1, 3, 0) and (2, 4).
    """
    known = rates or {}
    ordered = sorted(nodes, key=lambda node: (-known.get(node, 1.0), node))
    return RelayChains(tuple(tuple(ordered[first::num_chains]) for first in range(num_chains)))


def count_roots(
    volume: PushVolume, gpus_per_node: int, max_depth: int | None = None
) -> tuple[int, ...]:
    """Return the chains of each group: one per source node in all, at least one per group.

    More chains than source nodes share the source's NICs; ``max_depth`` asks for them all the same,
    for fleets in which long chains are not trusted.
    """
    sizes = [group_size(group) for group in volume.groups]
    source_nodes = max(1, volume.num_source_gpus // gpus_per_node)
    spare = max(0, min(source_nodes, volume.num_nodes) - len(sizes))
    roots: list[int] = []
    for size in sizes:
        share = 1 + spare * size // volume.num_nodes
        needed = math.ceil(size / max_depth) if max_depth else 1
        roots.append(min(size, max(share, needed)))
    return tuple(roots)


def group_size(group: Sequence[NodeKind]) -> int:
    """Return the nodes of all kinds of a group."""
    return sum(kind.count for kind in group)


def chain_length(group: Sequence[NodeKind], num_chains: int) -> int:
    """Return the nodes of the longest chain when a group is dealt into ``num_chains``."""
    return math.ceil(group_size(group) / num_chains)
