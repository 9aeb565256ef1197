"""Where the branches of a joined block lie in its linear form. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence


def branch_paths(linear: array[int], join: Sequence[int]) -> Iterator[array[int]]:
    """Yield the tokens that each branch was computed behind, and its own: trunk + branch.

    Example: ``list(branch_paths(array("q", [1, 2, 3, 4, 5]), (2, 1, 2)))`` is
    ``[array("q", [1, 2, 3]), array("q", [1, 2, 4, 5])]``.

    Args:
        linear: trunk, branch 1, branch 2, ...
        join: their lengths.
    """
    trunk, *lengths = join
    start = trunk
    for length in lengths:
        yield linear[:trunk] + linear[start : start + length]
        start += length
