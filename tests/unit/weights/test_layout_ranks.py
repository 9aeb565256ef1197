"""Both rank grids against Megatron's own generator of process groups."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npr_megatron.config.training import ParallelConfig
from npr_megatron.weights.layouts.ranks import RankPlace, place_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.parallel_state import RankGenerator

ORDER = "tp-cp-ep-dp-pp"


@st.composite
def grids(draw: st.DrawFn) -> ParallelConfig:
    tp, cp, pp = (draw(st.integers(1, 3)) for _ in range(3))
    ep, etp = draw(st.integers(1, 4)), draw(st.sampled_from([None, 1, 2, 3]))
    inside = ep * (etp or tp)
    dp = inside // math.gcd(inside, tp * cp) * draw(st.integers(1, 2))
    return ParallelConfig(tp_size=tp, cp_size=cp, dp_size=dp, pp_size=pp, ep_size=ep, etp_size=etp)


@settings(max_examples=150, deadline=None)
@given(grids())
def test_ranks_stand_where_megatron_puts_them(parallel: ParallelConfig):
    tp, cp, dp, pp = parallel.tp_size, parallel.cp_size, parallel.dp_size, parallel.pp_size
    ep, etp = parallel.ep_size, parallel.expert_tp_size
    dense = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=ORDER)
    expert_dp = tp * cp * dp // (ep * etp)
    experts = RankGenerator(tp=etp, ep=ep, dp=expert_dp, pp=pp, cp=1, order=ORDER)
    places = [place_of(parallel, rank) for rank in range(parallel.world_size)]
    for grid, token, axis in (
        (dense, "tp", "tp"),
        (dense, "cp", "cp"),
        (dense, "dp", "dp"),
        (dense, "pp", "stage"),
        (experts, "tp", "etp"),
        (experts, "ep", "ep"),
        (experts, "dp", "edp"),
        (experts, "pp", "stage"),
    ):
        for group in grid.get_ranks(token):
            assert [asdict(places[rank])[axis] for rank in group] == [*range(len(group))]


def test_one_rank_by_hand():
    parallel = ParallelConfig(tp_size=2, cp_size=2, dp_size=2, pp_size=2, ep_size=4, etp_size=1)
    assert place_of(parallel, 13) == RankPlace(stage=1, tp=1, cp=0, dp=1, etp=0, ep=1, edp=1)


@pytest.mark.parametrize(("etp", "expected"), [(None, 4), (1, 1), (2, 2)])
def test_experts_are_cut_like_the_rest_unless_told_otherwise(etp, expected):
    assert ParallelConfig(tp_size=4, etp_size=etp).expert_tp_size == expected
