"""Where a trainer rank stands: Megatron's two rank grids, dense and expert, over the same ranks.

Order tp-cp-ep-dp-pp, the left fastest. Context parallelism has no place in the expert grid, expert
parallelism none in the dense one.
"""

from __future__ import annotations

from dataclasses import dataclass

from npr_megatron.config.training import ParallelConfig


@dataclass(frozen=True, slots=True)
class RankPlace:
    """The coordinates of one rank. All that weights depend on is stage, tp, ep and etp."""

    stage: int
    tp: int
    cp: int
    dp: int
    etp: int
    ep: int
    edp: int
    """Among the ranks that hold the same experts."""


def place_of(parallel: ParallelConfig, rank: int) -> RankPlace:
    """Return the coordinates of ``rank`` of the world that ``parallel`` describes.

    Example:
        tp 2, dp 2, ep 2, etp 1: rank 3 is tp 1 of dp 1, and ep 1 of edp 1.
    """
    stage, inside = divmod(rank, parallel.ranks_per_stage)
    replica, tp = divmod(inside, parallel.tp_size)
    dp, cp = divmod(replica, parallel.cp_size)
    experts, etp = divmod(inside, parallel.expert_tp_size)
    edp, ep = divmod(experts, parallel.ep_size)
    return RankPlace(stage=stage, tp=tp, cp=cp, dp=dp, etp=etp, ep=ep, edp=edp)
