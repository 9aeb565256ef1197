"""Chains: every node once, equal lengths, slow nodes last, orphans adopted by the nearest alive."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.planning.relays import chain_length, count_roots, lay_chains
from tests.unit.planning.volumes import even_volume


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(1, 20), st.data())
def test_every_node_is_fed_once_and_nobody_behind_a_slower_one(nodes, num_chains, data):
    rates = data.draw(st.dictionaries(st.sampled_from(sorted(nodes)), st.floats(0.1, 1.0)))
    laid = lay_chains(sorted(nodes), min(num_chains, len(nodes)), rates)
    assert sorted(node for chain in laid.chains for node in chain) == sorted(nodes)
    lengths = [len(chain) for chain in laid.chains]
    assert max(lengths) - min(lengths) <= 1
    for chain in laid.chains:
        along = [rates.get(node, 1.0) for node in chain]
        assert along == sorted(along, reverse=True)


@given(st.integers(1, 60), st.integers(1, 8), st.sets(st.integers(0, 59)))
def test_orphans_turn_to_their_nearest_living_ancestor(num_nodes, num_chains, dead):
    laid = lay_chains(range(num_nodes), min(num_chains, num_nodes))
    healed = laid.without(dead)
    for node in set(range(num_nodes)) - dead:
        ancestor = laid.parent(node)
        while ancestor in dead:
            ancestor = laid.parent(ancestor)
        assert healed.parent(node) == ancestor


def test_a_dead_node_has_no_parent_any_more():
    with pytest.raises(KeyError):
        lay_chains(range(4), 1).without([2]).parent(2)


def test_one_chain_per_trainer_node_and_at_least_one_per_kind():
    assert count_roots(even_volume(470, 64, 512), 8) == (8,)
    assert count_roots(even_volume(470, 64, 4), 8) == (4,)
    assert count_roots(even_volume(470, 64, 8, num_kinds=4), 8) == (2, 2, 2, 2)
    assert count_roots(even_volume(470, 8, 64, num_kinds=8), 8) == (1,) * 8
    assert count_roots(even_volume(470, 4, 64), 8) == (1,)


def test_a_depth_cap_asks_for_more_chains():
    volume = even_volume(470, 64, 512)
    roots = count_roots(volume, 8, max_depth=10)
    assert roots == (52,)
    assert chain_length(volume.kinds, 52) == 10
