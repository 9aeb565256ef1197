"""The topologies of a run: thousands, different from each other, the same on every machine."""

from __future__ import annotations

from functools import cache

from hypothesis import HealthCheck, Phase, given, settings

from tests.unit.weights.topologies import KINDS, Topology, topologies

PER_KIND = 230
LEAST = 2000
"""Topologies in the sample; more are drawn because some are doubles."""


@cache
def sample() -> tuple[Topology, ...]:
    """Return all topologies of a run, kinds in turn."""
    by_kind = [_drawn(kind) for kind in KINDS]
    mixed = [kind[index] for index in range(PER_KIND) for kind in by_kind]
    distinct = {repr(topology): topology for topology in mixed}
    assert len(distinct) >= LEAST
    return tuple(distinct.values())[:LEAST]


def _drawn(kind: str) -> list[Topology]:
    found: list[Topology] = []

    @settings(
        max_examples=PER_KIND,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(topologies(kind))
    def collect(topology: Topology) -> None:
        found.append(topology)

    collect()
    return found


def nodes_of(topology: Topology, number: int) -> list[int] | None:
    """Return where the ranks of an engine are: in turn each alone, all together, in pairs."""
    ranks = range(topology.engine_tp_size)
    return (None, [0] * len(ranks), [rank // 2 for rank in ranks])[number % 3]
