"""The execution graph, against a hand-made example and against a direct count."""

from __future__ import annotations

from hypothesis import given

from npr_megatron.schema.graph import Node, execution_graph
from npr_megatron.schema.parse import Document, Span, parse
from tests.structures import QUICK, SMALL, Structure, structures
from tests.unit.schema.spelling import TWO_BRANCHES, ids


def document_of(structure: Structure) -> Document:
    document = parse(structure.response_ids, structure.vocabulary).document
    assert document is not None
    return document


def test_graph_of_a_small_response_is_the_one_drawn_by_hand():
    document = parse(ids(TWO_BRANCHES), SMALL).document
    assert document is not None
    graph = execution_graph(document)
    assert graph.nodes == (
        Node(Span(0, 14), 0, 0),
        Node(Span(14, 20), 1, 1),
        Node(Span(20, 27), 1, 2),
        Node(Span(27, 35), 0, 0),
    )
    assert graph.edges == ((0, 1), (0, 2), (1, 3), (2, 3))
    assert graph.levels == ((0,), (1, 2), (3,))
    assert graph.total_tokens == 35
    assert graph.critical_path_tokens == 14 + 7 + 8


@QUICK
@given(structures())
def test_nodes_tile_the_response_and_edges_point_to_the_next_level(structure: Structure):
    graph = execution_graph(document_of(structure))
    borders = [0, *(node.span.stop for node in graph.nodes)]
    assert [node.span.start for node in graph.nodes] == borders[:-1]
    assert borders[-1] == graph.total_tokens == len(structure.response_ids)
    level_of = {node: level for level, nodes in enumerate(graph.levels) for node in nodes}
    assert sorted(level_of) == list(range(len(graph.nodes)))
    between = {
        (source, target)
        for source in level_of
        for target in level_of
        if level_of[target] == level_of[source] + 1
    }
    assert set(graph.edges) == between and len(graph.edges) == len(between)


@QUICK
@given(structures())
def test_critical_path_leaves_out_all_but_the_longest_branch_of_each_block(structure: Structure):
    graph = execution_graph(document_of(structure))
    spared = 0
    for block in structure.blocks:
        lengths = sorted(len(step) for step in block.steps)
        overhead = len(structure.vocabulary.step_header(1)) + 2  # </step> and its newline
        spared += sum(length + overhead for length in lengths[:-1])
    assert graph.critical_path_tokens == graph.total_tokens - spared
