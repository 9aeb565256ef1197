"""Which scores a penalty touches: what the stream sees, and in a branch what it said itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from npr_megatron.engine.compute.penalties import penalised
from npr_megatron.engine.flow.distinct import DistinctTokens
from npr_megatron.engine.flow.flow import Flow, Stream
from npr_megatron.engine.flow.segment import linearise
from npr_megatron.records.request import GenerationRequest
from npr_megatron.records.trajectory import DecodeMode
from npr_megatron.schema.grammar import Grammar
from npr_megatron.topology.visibility import dense_mask
from tests.engines import request_for, teacher_of
from tests.structures import NUM_IDS, QUICK, SMALL, WORDS, Structure, structures


def rounds(structure: Structure, **settings: float) -> Iterator[list[Stream]]:
    """Grow a flow along ``structure``; yield its open streams each time all await a token."""
    request = dataclasses.replace(request_for(structure.prompt_ids), **settings)
    vocabulary = structure.vocabulary
    flow = Flow(request, Grammar(vocabulary), vocabulary.eos)
    teach = teacher_of(structure.token_ids, structure.prompt_length, vocabulary)
    while flow.finish is None:
        flow.begin_round(0)
        streams = list(flow.decoding)
        yield streams
        for stream in streams:
            segment = stream.segment
            token_id = teach(segment.block, segment.branch, stream.index)
            assert token_id is not None
            flow.accept(stream, token_id, 0.0, 0)


def changes(streams: list[Stream]) -> list[dict[int, float]]:
    """Return, per stream, by what each score of -1 was multiplied."""
    scores = penalised(torch.full((len(streams), NUM_IDS), -1.0), streams)
    return [{i: -x for i, x in enumerate(row) if x != -1.0} for row in scores.tolist()]


def visible_and_said(stream: Stream) -> tuple[set[int], set[int]]:
    """Read off the attention mask what a stream sees, and what it sampled in its branch."""
    flow = stream.flow
    labels = linearise(flow.segments)
    last = sum(len(s.token_ids) for s in flow.segments[: flow.segments.index(stream.segment) + 1])
    mask = dense_mask(np.zeros_like(labels["block"]), labels["block"], labels["branch"])[last - 1]
    own = (labels["block"] == stream.segment.block) & (labels["branch"] == stream.segment.branch)
    said = own & ~labels["forced"] & (stream.segment.branch > 0)
    return set(labels["token_ids"][mask].tolist()), set(labels["token_ids"][said].tolist())


@QUICK
@given(structures())
def test_a_stream_is_penalised_for_what_its_attention_sees(structure: Structure) -> None:
    for streams in rounds(structure, repetition_penalty=1.5):
        for stream, changed in zip(streams, changes(streams), strict=True):
            seen, _ = visible_and_said(stream)
            assert changed == dict.fromkeys(seen, 1.5)


@QUICK
@given(structures())
def test_a_branch_is_penalised_on_top_for_what_it_said_itself(structure: Structure) -> None:
    both = {"repetition_penalty": 1.5, "step_repetition_penalty": 2.0}
    for streams in rounds(structure, **both):
        for stream, changed in zip(streams, changes(streams), strict=True):
            seen, said = visible_and_said(stream)
            assert changed == {i: 3.0 if i in said else 1.5 for i in seen}
    for streams in rounds(structure, step_repetition_penalty=2.0):
        for stream, changed in zip(streams, changes(streams), strict=True):
            assert changed == dict.fromkeys(visible_and_said(stream)[1], 2.0)


def plain_stream(prompt_ids: tuple[int, ...], penalty: float) -> Stream:
    request = GenerationRequest(
        prompt_id="p",
        rollout=0,
        prompt_ids=prompt_ids,
        mode=DecodeMode.SEQUENTIAL,
        max_new_tokens=9,
        max_critical_path=9,
        seed=0,
        repetition_penalty=penalty,
    )
    return Flow(request, Grammar(SMALL), SMALL.eos).trunk


def test_positive_scores_are_divided_and_only_rows_that_ask_are_touched() -> None:
    streams = [plain_stream((1, 1, 2), 2.0), plain_stream((1,), 1.0), plain_stream((3,), 0.5)]
    scores = torch.tensor([4.0, 6.0, -8.0, 10.0]).repeat(3, 1)
    before = scores.clone()
    assert penalised(scores, streams).tolist() == [
        [4.0, 3.0, -16.0, 10.0],
        [4.0, 6.0, -8.0, 10.0],
        [4.0, 6.0, -8.0, 20.0],
    ]
    assert torch.equal(scores, before)
    assert penalised(scores, streams[1:2]) is scores, "nobody asks, nothing is copied"


@QUICK
@given(st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=400), st.data())
def test_distinct_tokens_are_those_of_a_set_however_the_text_grows(
    text: list[tuple[int, bool]], data: st.DataObject
) -> None:
    distinct, length = DistinctTokens(), 0
    while length < len(text):
        length += data.draw(st.integers(1, len(text) - length))
        tokens, forced = zip(*text[:length], strict=True)
        distinct.read(tokens, forced)
        assert distinct.ids.tolist() == list(dict.fromkeys(tokens))
        sampled = {token for token, is_forced in text[:length] if not is_forced}
        assert set(distinct.ids[distinct.is_sampled].tolist()) == sampled


def test_the_next_token_costs_no_look_at_those_before_it() -> None:
    distinct = DistinctTokens()
    tokens, forced = list(WORDS), [False] * len(WORDS)
    distinct.read(tokens, forced)
    tokens[:] = [0] * len(tokens)  # noticed if they were looked at again
    tokens.append(7)
    distinct.read(tokens, [*forced, True])
    assert distinct.ids.tolist() == [*WORDS, 7]
