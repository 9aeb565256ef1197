"""Shares of requests: complete, together, balanced, reproducible."""

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.records.request import GenerationRequest
from npr_megatron.rollout.router import split_requests
from tests.engines import request_for
from tests.structures import QUICK


def requests_of(groups: list[tuple[int, int, int]]) -> list[GenerationRequest]:
    """Requests of prompts given as (prompt tokens, new tokens, rollouts)."""
    return [
        request_for(range(20, 20 + length), prompt_id=f"p{i}", rollout=r, max_new_tokens=tokens)
        for i, (length, tokens, rollouts) in enumerate(groups)
        for r in range(rollouts)
    ]


def work(share: tuple[GenerationRequest, ...]) -> int:
    return sum(len(request.prompt_ids) + request.max_new_tokens for request in share)


GROUPS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 200), st.integers(1, 6)), max_size=12
)


@QUICK
@given(GROUPS, st.integers(1, 6))
def test_every_request_is_in_exactly_one_share_and_shares_keep_the_order(groups, num_replicas):
    requests = requests_of(groups)
    shares = split_requests(requests, num_replicas)
    assert len(shares) == num_replicas
    assert Counter(r.request_id for s in shares for r in s) == Counter(
        r.request_id for r in requests
    )
    order = {request.request_id: index for index, request in enumerate(requests)}
    for share in shares:
        places = [order[request.request_id] for request in share]
        assert places == sorted(places)


@QUICK
@given(GROUPS, st.integers(1, 6))
def test_rollouts_of_one_prompt_share_a_replica_when_there_are_enough_prompts(groups, num_replicas):
    shares = split_requests(requests_of(groups), num_replicas)
    homes = Counter(prompt for share in shares for prompt in {r.prompt_id for r in share})
    if len(groups) >= num_replicas:
        assert set(homes.values()) <= {1}


@QUICK
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 99), st.just(1)), min_size=3, max_size=7),
    st.integers(1, 3),
)
def test_the_busiest_replica_is_within_four_thirds_of_the_best_possible(groups, num_replicas):
    requests = requests_of(groups)
    best = min(
        max(
            sum(work((r,)) for r, home in zip(requests, homes, strict=True) if home == replica)
            for replica in range(num_replicas)
        )
        for homes in itertools.product(range(num_replicas), repeat=len(requests))
    )
    assert max(map(work, split_requests(requests, num_replicas))) <= 4 / 3 * best


def test_one_prompt_with_many_rollouts_keeps_every_replica_busy():
    shares = split_requests(requests_of([(3, 50, 8)]), 4)
    assert [len(share) for share in shares] == [2, 2, 2, 2]


def test_more_replicas_than_requests_leaves_some_idle():
    shares = split_requests(requests_of([(3, 50, 1), (3, 50, 1)]), 4)
    assert sorted(len(share) for share in shares) == [0, 0, 1, 1]
