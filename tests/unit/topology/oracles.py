"""Slow, independent statements of the topology rules, built from texts and not from the grammar."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from npr_megatron.schema.graph import execution_graph
from npr_megatron.schema.parse import parse
from npr_megatron.schema.tags import Vocabulary
from tests.structures import Structure


@dataclass(frozen=True)
class Run:
    """Tokens one after another: the trunk."""

    ids: tuple[int, ...]
    is_forced: tuple[bool, ...]


@dataclass(frozen=True)
class Fork:
    """Programs side by side."""

    branches: tuple[list[Run | Fork], ...]


@dataclass(frozen=True)
class Token:
    """What a walk says about one token."""

    token_id: int
    position: int
    block: int
    branch: int
    is_forced: bool


def program_of(structure: Structure) -> list[Run | Fork]:
    """The structure as a tree of runs and forks, with the canonical grouping of the newlines."""
    v = structure.vocabulary
    program: list[Run | Fork] = [_forced(structure.prompt_ids)]
    for number, block in enumerate(structure.blocks):
        between = (v.newline,) if number else ()
        program.append(_sampled((*between, v.guideline_open, v.newline)))
        for index, plan in zip(v.index_ids, block.plans, strict=False):
            program.append(_sampled((v.plan_open, *index, *plan, v.plan_close, v.newline)))
        program += [_sampled((v.guideline_close,)), _forced((v.newline,))]
        branches = []
        for index, step in zip(v.index_ids, block.steps, strict=False):
            header = _forced((v.step_open, v.newline, *index))
            branches.append([header, _sampled((*step, v.step_close)), _forced((v.newline,))])
        program.append(Fork(tuple(branches)))
        program.append(_forced((v.takeaway_open, v.newline)))
        program.append(_sampled((*block.takeaway, v.takeaway_close)))
    program.append(_sampled((v.newline, *structure.conclusion, v.eos)))
    return program


def walk(
    program: list[Run | Fork], start: int = 0, block: int = 0, branch: int = 0
) -> tuple[list[Token], int]:
    """Place a program from ``start``; recursive. Returns its tokens and the position behind it."""
    tokens: list[Token] = []
    num_blocks = 0
    for item in program:
        if isinstance(item, Run):
            for token_id, is_forced in zip(item.ids, item.is_forced, strict=True):
                tokens.append(Token(token_id, start, block, branch, is_forced))
                start += 1
        else:
            num_blocks += 1
            ends = []
            for number, inner in enumerate(item.branches, start=1):
                inner_tokens, end = walk(inner, start, num_blocks, number)
                tokens += inner_tokens
                ends.append(end)
            start = max(ends)
    return tokens, start


def paper_positions(token_ids: list[int], prompt_length: int, v: Vocabulary) -> list[int]:
    """Algorithm 2 as published: number everything, then shift tails at <step> and <takeaway>."""
    positions = np.arange(len(token_ids))
    anchor = longest = 0
    for t in range(prompt_length, len(token_ids)):
        if token_ids[t] == v.guideline_close:
            anchor, longest = positions[t], 0
        elif token_ids[t] == v.step_open:
            positions[t:] += anchor + 1 - positions[t]
        elif token_ids[t] == v.step_close:
            longest = max(longest, positions[t] - anchor)
        elif token_ids[t] == v.takeaway_open:
            positions[t:] += anchor + longest + 1 - positions[t]
    return positions.tolist()


def ancestors_mask(structure: Structure) -> np.ndarray:
    """[T, T] visibility over the execution graph: own node up to the query, and all ancestors."""
    document = parse(structure.response_ids, structure.vocabulary).document
    assert document is not None
    graph = execution_graph(document)
    parents: dict[int, set[int]] = {index: set() for index in range(len(graph.nodes))}
    for source, target in graph.edges:
        parents[target].add(source)

    def ancestors(node: int) -> set[int]:
        return parents[node].union(*(ancestors(parent) for parent in parents[node]))

    node_of = [0] * structure.prompt_length
    for index, node in enumerate(graph.nodes):
        node_of += [index] * node.span.num_tokens
    reach = [ancestors(node) for node in range(len(graph.nodes))]
    size = len(node_of)
    mask = np.zeros((size, size), dtype=bool)
    for query in range(size):
        for key in range(size):
            is_own = node_of[key] == node_of[query] and key <= query
            mask[query, key] = is_own or node_of[key] in reach[node_of[query]]
    return mask


def _forced(ids: tuple[int, ...]) -> Run:
    return Run(ids, (True,) * len(ids))


def _sampled(ids: tuple[int, ...]) -> Run:
    return Run(ids, (False,) * len(ids))
