"""What goes wrong in a simulated push, given node by node or drawn at random."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What is not as it should be. Nodes are those of the fleet; trainer nodes are healthy."""

    jitter: float = 0.0
    """Standard deviation of each chunk's time on each link, as a share of its mean (lognormal)."""
    slow: Mapping[int, float] = field(default_factory=dict[int, float])
    """NIC rate of slow nodes, as a share of the ordinary one."""
    deaths: Mapping[int, float] = field(default_factory=dict[int, float])
    """When nodes die [s after the start]."""
    detection_s: float = 0.5
    """From a death until the orphans turn to the next living ancestor [s]."""
    are_rates_known: bool = True
    """Slow nodes were measured, and stand last in their chains."""
    seed: int = 0


def draw_conditions(
    num_nodes: int,
    *,
    num_slow: int = 0,
    slow_rate: float = 0.5,
    num_dead: int = 0,
    dead_within_s: float = 0.0,
    jitter: float = 0.0,
    detection_s: float = 0.5,
    are_rates_known: bool = True,
    seed: int = 0,
) -> Conditions:
    """Return conditions with slow and dead nodes chosen by ``seed``; none is both.

    Args:
        num_slow: with ``num_dead`` at most ``num_nodes``.
        dead_within_s: deaths are spread evenly over this time from the start [s].
    """
    chance = random.Random(seed)
    chosen = chance.sample(range(num_nodes), num_slow + num_dead)
    return Conditions(
        jitter=jitter,
        slow={node: slow_rate for node in sorted(chosen[:num_slow])},
        deaths={node: chance.uniform(0, dead_within_s) for node in sorted(chosen[num_slow:])},
        detection_s=detection_s,
        are_rates_known=are_rates_known,
        seed=seed,
    )
