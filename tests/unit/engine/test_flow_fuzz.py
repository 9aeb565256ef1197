"""Random token streams through the pure flow: no model, no memory, nothing but ids.

The oracle for what ends properly is ``schema.parse`` with ``layout_of``; what was cut short is held
against the rules in words.
"""

from __future__ import annotations

import functools
import random

import numpy as np

from npr_megatron.engine.flow.flow import Flow, Stream
from npr_megatron.records.request import GenerationRequest, RefusalPolicy
from npr_megatron.records.trajectory import DecodeMode, FinishReason, Trajectory
from npr_megatron.schema.grammar import Grammar, State
from npr_megatron.schema.parse import parse
from npr_megatron.schema.rules import Rule
from npr_megatron.topology.layout import layout_of
from tests.engines import request_for
from tests.structures import NUM_IDS, SMALL, SPLIT
from tests.trees import assert_is_a_tree

NUM_SEEDS = 3000
GRAMMARS = [Grammar(SMALL), Grammar(SPLIT)]
BUDGETS = {FinishReason.LENGTH, FinishReason.CRITICAL_PATH}


@functools.cache
def choices(grammar: Grammar, state: State) -> tuple[list[int], list[int], list[int]]:
    """Return the legal ids that are tags or the end, all legal ids, and the illegal ones."""
    rules = [grammar.advance(state, token_id)[1] for token_id in range(NUM_IDS)]
    legal = [token_id for token_id, rule in enumerate(rules) if rule is None]
    special = {*grammar.vocabulary.tags, grammar.vocabulary.eos}.intersection(legal)
    illegal = [token_id for token_id, rule in enumerate(rules) if rule is not None]
    return sorted(special), legal, illegal


def next_id(rng: random.Random, grammar: Grammar, state: State, error_rate: float) -> int:
    """Mostly a legal id; tags are as likely as all words together."""
    special, legal, illegal = choices(grammar, state)
    if illegal and rng.random() < error_rate:
        return rng.choice(illegal)
    return rng.choice(special if special and rng.random() < 0.5 else legal)


def random_request(rng: random.Random) -> GenerationRequest:
    return request_for(
        rng.choices(range(NUM_IDS), k=rng.randint(1, 5)),
        mode=rng.choices(list(DecodeMode), [1, 9])[0],
        max_new_tokens=rng.choice([rng.randint(1, 60), 400]),
        max_critical_path=rng.choice([rng.randint(1, 60), 400]),
        on_refusal=rng.choice(list(RefusalPolicy)),
    )


def run(seed: int) -> tuple[Flow, list[Stream]]:
    """Drive one flow with random ids to its end; return it with the branches closed by force."""
    rng = random.Random(seed)
    grammar = rng.choice(GRAMMARS)
    flow = Flow(random_request(rng), grammar, grammar.vocabulary.eos)
    trunk_errors, branch_errors = rng.choice([0.0, 0.0, 0.02]), rng.choice([0.0, 0.02, 0.2])
    refused: list[Stream] = []
    for _ in range(2 + flow.request.max_new_tokens):
        flow.begin_round(version=3)
        if flow.finish is None:
            for stream in flow.decoding:
                error_rate = branch_errors if stream.segment.branch else trunk_errors
                token_id = next_id(rng, grammar, stream.state, error_rate)
                if flow.accept(stream, token_id, -1.0, 3):
                    refused.append(stream)
                if flow.finish is not None:
                    break
        if flow.finish is not None:
            return flow, refused
    raise AssertionError("the flow took more rounds than it may take tokens")


def assert_budgets_hold(trajectory: Trajectory, request: GenerationRequest) -> None:
    assert trajectory.num_tokens <= request.max_new_tokens
    assert trajectory.critical_path_tokens <= request.max_critical_path
    # Only a forced run that does not fit as a whole may leave budget unspent.
    longest_run = 2 + 5 * (4 + 3)
    if trajectory.finish is FinishReason.LENGTH:
        assert request.max_new_tokens - trajectory.num_tokens <= longest_run
    if trajectory.finish is FinishReason.CRITICAL_PATH:
        assert request.max_critical_path - trajectory.critical_path_tokens <= 2 + 4 + 3


def assert_end_is_explained(flow: Flow, trajectory: Trajectory, refused: list[Stream]) -> None:
    request, grammar = flow.request, flow.grammar
    is_parallel = request.mode is DecodeMode.PARALLEL
    is_training = request.on_refusal is RefusalPolicy.TERMINATE
    if trajectory.finish is FinishReason.MALFORMED:
        assert is_parallel and is_training
        assert_rule_is_named(trajectory, grammar)
    elif trajectory.finish is FinishReason.STOP:
        assert trajectory.token_ids[-1] == grammar.vocabulary.eos
    else:
        assert trajectory.finish in BUDGETS
    for stream in refused:
        assert not is_training and trajectory.finish_detail
        assert grammar.vocabulary.step_close in stream.segment.token_ids[-2:]
    if trajectory.finish is not FinishReason.STOP or not is_parallel:
        return
    if not trajectory.finish_detail:
        assert_is_the_document(trajectory, grammar)
    assert not (is_training and trajectory.finish_detail)


def assert_rule_is_named(trajectory: Trajectory, grammar: Grammar) -> None:
    """On the trunk the parser names the same rule at the same token; in a branch the linear form is
    not what was read.
    """
    rule = Rule(trajectory.finish_detail)
    if trajectory.branch[-1] == 0:
        violation = parse(trajectory.response_ids, grammar.vocabulary).violations[0]
        assert (violation.rule, violation.position) == (rule, trajectory.num_tokens - 1)


def assert_is_the_document(trajectory: Trajectory, grammar: Grammar) -> None:
    """The parser reads it as well-formed and the layout of the text is what was recorded."""
    length = trajectory.prompt_length
    assert parse(trajectory.response_ids, grammar.vocabulary).document is not None
    layout = layout_of(trajectory.token_ids, length, grammar.vocabulary)
    for name in ("position_ids", "block", "branch", "forced"):
        np.testing.assert_array_equal(getattr(trajectory, name), getattr(layout, name), name)


def test_random_streams_end_with_a_reason_as_trees_within_their_budgets() -> None:
    ends: set[tuple[RefusalPolicy, FinishReason, bool]] = set()
    num_forks = num_refused = 0
    for seed in range(NUM_SEEDS):
        try:
            flow, refused = run(seed)
            trajectory = flow.trajectory()
            assert_is_a_tree(trajectory, flow.grammar.vocabulary)
            assert_budgets_hold(trajectory, flow.request)
            assert flow.usage.resident_kv < len(trajectory.token_ids)
            assert_end_is_explained(flow, trajectory, refused)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
        ends.add((flow.request.on_refusal, trajectory.finish, bool(trajectory.finish_detail)))
        num_forks += trajectory.num_blocks
        num_refused += len(refused)
    assert num_forks > NUM_SEEDS / 2
    assert num_refused > 20
    assert len(ends) == 12, ends
