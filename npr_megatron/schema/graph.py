"""A document as the graph it executes: trunk segments and branches, forked and joined.

Nodes are contiguous spans of the response, so the graph counts tokens and knows nothing of
positions or attention (``topology`` does). Fork and join newlines belong to the segment or branch
they end.
"""

from __future__ import annotations

from dataclasses import dataclass

from npr_megatron.schema.parse import Document, Span


@dataclass(frozen=True, slots=True)
class Node:
    """A run of tokens decoded one after another."""

    span: Span
    block: int
    """1-based block of a branch; 0 for a trunk segment."""
    branch: int
    """1-based branch inside the block; 0 for a trunk segment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionGraph:
    """Who waits for whom.

    Example, one block of two branches: nodes 0 (trunk), 1, 2 (branches), 3 (trunk), edges
    ``(0, 1) (0, 2) (1, 3) (2, 3)``, levels ``((0,), (1, 2), (3,))``.
    """

    nodes: tuple[Node, ...]
    """In the order of the response, which is a topological order."""
    edges: tuple[tuple[int, int], ...]
    """(node, node that waits for it)."""
    levels: tuple[tuple[int, ...], ...]
    """Nodes that may run at the same time; trunk segments and forks alternate."""

    @property
    def total_tokens(self) -> int:
        """Tokens of the response over all branches."""
        return sum(node.span.num_tokens for node in self.nodes)

    @property
    def critical_path_tokens(self) -> int:
        """Tokens on the longest path: decode steps that no parallelism saves."""
        finished = [0] * len(self.nodes)
        waits_for: list[list[int]] = [[] for _ in self.nodes]
        for source, target in self.edges:
            waits_for[target].append(source)
        for index, node in enumerate(self.nodes):
            ready = max((finished[source] for source in waits_for[index]), default=0)
            finished[index] = ready + node.span.num_tokens
        return max(finished)


def execution_graph(document: Document) -> ExecutionGraph:
    """Return the fork and join graph of a well-formed response."""
    nodes: list[Node] = []
    edges: list[tuple[int, int]] = []
    levels: list[tuple[int, ...]] = []
    trunk_start = 0
    waiting: tuple[int, ...] = ()
    for number, block in enumerate(document.blocks, start=1):
        branches = block.branches
        trunk = len(nodes)
        nodes.append(Node(Span(trunk_start, branches[0].start), 0, 0))
        nodes += [Node(span, number, branch) for branch, span in enumerate(branches, start=1)]
        edges += [(source, trunk) for source in waiting]
        waiting = tuple(range(trunk + 1, len(nodes)))
        edges += [(trunk, branch) for branch in waiting]
        levels += [(trunk,), waiting]
        trunk_start = branches[-1].stop
    edges += [(source, len(nodes)) for source in waiting]
    levels.append((len(nodes),))
    nodes.append(Node(Span(trunk_start, document.num_tokens), 0, 0))
    return ExecutionGraph(nodes=tuple(nodes), edges=tuple(edges), levels=tuple(levels))
