"""Stages stop where the structure takes over or is broken, and nowhere else that matters."""

from __future__ import annotations

import random

import pytest

from npr_megatron.engine.sglang.client.stops import Stops
from npr_megatron.schema.grammar import Grammar
from npr_megatron.schema.tags import Tag
from npr_megatron.topology.layout import layout_of
from tests.structures import SMALL, SPLIT, random_structure

GRAMMARS = [Grammar(SMALL), Grammar(SPLIT)]


@pytest.mark.parametrize("grammar", GRAMMARS, ids=["small", "split"])
def test_a_trunk_stops_at_forks_ends_and_what_only_the_engine_writes(grammar):
    vocabulary = grammar.vocabulary
    stops = Stops.of(grammar)
    names = {vocabulary.tags.get(token_id, "end") for token_id in stops.trunk}
    assert names == {
        Tag.GUIDELINE_CLOSE,
        Tag.STEP_OPEN,
        Tag.STEP_CLOSE,
        Tag.TAKEAWAY_OPEN,
        "end",
    }
    assert set(stops.branch) == {*vocabulary.tags, vocabulary.eos}
    assert stops.plain == (vocabulary.eos,)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("grammar", GRAMMARS, ids=["small", "split"])
def test_in_legal_responses_stages_stop_just_before_forced_tokens_and_at_the_end(grammar, seed):
    stops = Stops.of(grammar)
    structure = random_structure(
        random.Random(seed), (20, 21), grammar.vocabulary, num_blocks=(1, 3), max_branches=4
    )
    layout, ids = layout_of(structure.token_ids, 2, grammar.vocabulary), structure.token_ids
    for index in range(2, len(ids)):
        if layout.forced[index]:
            continue  # never sampled
        wanted = stops.branch if layout.block[index] else stops.trunk
        is_followed_by_force = index + 1 == len(ids) or bool(layout.forced[index + 1])
        assert (ids[index] in wanted) == is_followed_by_force
