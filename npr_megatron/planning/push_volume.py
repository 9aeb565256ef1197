"""How many bytes a push moves from whom to where: all that closed forms and simulation need.

Nodes that need the same bytes are one kind, so nothing here grows with the fleet. Each byte that a
node needs is counted once: its GPUs share what its NICs receive.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeKind:
    """Nodes of the fleet whose GPUs hold the same parts of a model, and are as many.

    Example: TP 16 engines on nodes of 8 GPUs make two kinds, ranks 0-7 and ranks 8-15.
    """

    nodes: tuple[int, ...]
    """Which nodes of the fleet, counted from 0."""
    content: int
    """Kinds of equal content need the same bytes and can forward them to each other."""
    bytes_from: tuple[int, ...]
    """What one such node takes from each source rank [bytes]."""
    gpu_bytes: tuple[int, ...]
    """What each GPU of the node that belongs to an engine holds in the end [bytes]."""

    @property
    def count(self) -> int:
        """Nodes of this kind."""
        return len(self.nodes)

    @property
    def node_bytes(self) -> int:
        """What one node receives over its NICs [bytes]."""
        return sum(self.bytes_from)

    @property
    def num_nics(self) -> int:
        """NICs that receive: one per GPU of an engine."""
        return len(self.gpu_bytes)

    @property
    def nvlink_bytes(self) -> float:
        """What the fullest GPU still needs from its neighbours, the NICs having shared evenly."""
        return max(0.0, max(self.gpu_bytes) - self.node_bytes / self.num_nics)


@dataclass(frozen=True, slots=True, kw_only=True)
class PushVolume:
    """One push of one version to a whole fleet."""

    model_bytes: int
    """One replica as served, each element once [bytes]."""
    kinds: tuple[NodeKind, ...]

    @property
    def num_source_gpus(self) -> int:
        """Source ranks, each with its NIC."""
        return len(self.kinds[0].bytes_from)

    @property
    def num_nodes(self) -> int:
        """Nodes of the fleet."""
        return sum(kind.count for kind in self.kinds)

    @property
    def num_target_nics(self) -> int:
        """NICs of the fleet."""
        return sum(kind.count * kind.num_nics for kind in self.kinds)

    @property
    def wire_bytes(self) -> int:
        """What crosses NICs into the fleet's nodes; no way of pushing moves less [bytes]."""
        return sum(kind.count * kind.node_bytes for kind in self.kinds)

    @property
    def gpu_bytes(self) -> int:
        """What the fullest GPU of the fleet holds [bytes]."""
        return max(max(kind.gpu_bytes) for kind in self.kinds)

    @property
    def groups(self) -> tuple[tuple[NodeKind, ...], ...]:
        """Kinds of equal content; who has the most NICs comes first, half-empty nodes last."""
        together: dict[int, list[NodeKind]] = {}
        for kind in self.kinds:
            together.setdefault(kind.content, []).append(kind)
        return tuple(
            tuple(sorted(group, key=lambda kind: -kind.num_nics)) for group in together.values()
        )

    def direct_egress(self) -> tuple[int, ...]:
        """Return what each source sends if it feeds every node itself [bytes]."""
        return _egress((kind, kind.count) for kind in self.kinds)

    def root_egress(self, num_roots: Sequence[int]) -> tuple[int, ...]:
        """Return what each source sends if it feeds ``num_roots[i]`` nodes of group i [bytes]."""
        return _egress(
            (group[0], roots) for group, roots in zip(self.groups, num_roots, strict=True)
        )


def _egress(fed: Iterable[tuple[NodeKind, int]]) -> tuple[int, ...]:
    sent = np.sum([count * np.array(kind.bytes_from) for kind, count in fed], axis=0)
    return tuple(int(size) for size in sent)
