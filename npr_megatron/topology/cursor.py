"""The position rule, grown one token at a time.

Trunk tokens count up. At a fork every branch starts at the same position; after the join the trunk
goes on behind the furthest branch. The engine grows one cursor per trajectory with its branches
interleaved, ``layout_of`` grows one along a linearised text; equal tokens get equal places either
way.

Two conventions: ``canonical`` forks right behind the newline that follows ``</guideline>`` and
joins right behind the furthest newline that follows ``</step>``. ``paper`` overlaps each of these
two newlines by one position (arXiv 2512.07461, Algorithm 2) and exists to score checkpoints
released with it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from npr_megatron.errors import LayoutError

Convention = Literal["canonical", "paper"]


class Place(NamedTuple):
    """Where one token stands; block and branch count from 1 and are 0 on the trunk."""

    position: int
    block: int
    branch: int


class TopologyCursor:
    """Hands out places. Mutable; one per trajectory.

    Example, a trunk of 3 tokens, branches of 2 and 1, then the trunk again (canonical)::

        cursor = TopologyCursor()
        [cursor.place_trunk().position for _ in range(3)]   # 0 1 2
        cursor.fork(2)
        cursor.place_branch(1)                              # Place(3, 1, 1)
        cursor.place_branch(2)                              # Place(3, 1, 2)
        cursor.place_branch(1)                              # Place(4, 1, 1)
        cursor.join()
        cursor.place_trunk()                                # Place(5, 0, 0)
    """

    __slots__ = ("_branches", "_overlap", "_trunk", "block")

    def __init__(self, convention: Convention = "canonical", start: int = 0) -> None:
        self.block = 0
        """Blocks forked so far: the 1-based number of an open one."""
        self._overlap = 1 if convention == "paper" else 0
        self._trunk = start
        self._branches: list[int] = []

    @property
    def is_forked(self) -> bool:
        """Whether branches are open."""
        return bool(self._branches)

    @property
    def position(self) -> int:
        """Position of the next trunk token; while forked, as if the branches were joined now."""
        return max(self._branches) - self._overlap if self._branches else self._trunk

    def place_trunk(self) -> Place:
        """Place the next trunk token.

        Raises:
            LayoutError: branches are open.
        """
        return Place(self.advance_trunk(), 0, 0)

    def advance_trunk(self) -> int:
        """Place the next trunk token and return its position only.

        Raises:
            LayoutError: branches are open.
        """
        if self._branches:
            raise LayoutError(
                f"a trunk token was asked for, but {len(self._branches)} branches of block "
                f"{self.block} are open; join them first"
            )
        self._trunk += 1
        return self._trunk - 1

    def fork(self, num_branches: int) -> None:
        """Open ``num_branches`` branches behind the trunk token placed last.

        Raises:
            LayoutError: branches are open already, or fewer than one is asked for.
        """
        if self._branches or num_branches < 1:
            raise LayoutError(
                f"a fork into {num_branches} branches was asked for, with {len(self._branches)} "
                f"open in block {self.block}; forks do not nest and need at least one branch"
            )
        self.block += 1
        self._branches = [self._trunk - self._overlap] * num_branches

    def place_branch(self, branch: int) -> Place:
        """Place the next token of branch ``branch`` (1-based).

        Raises:
            LayoutError: no such branch is open.
        """
        return Place(self.advance_branch(branch), self.block, branch)

    def advance_branch(self, branch: int) -> int:
        """Place the next token of branch ``branch`` and return its position only.

        Raises:
            LayoutError: no such branch is open.
        """
        if not 1 <= branch <= len(self._branches):
            raise LayoutError(
                f"a token of branch {branch} was asked for, but {len(self._branches)} branches are "
                "open; fork first, and count branches from 1"
            )
        self._branches[branch - 1] += 1
        return self._branches[branch - 1] - 1

    def join(self) -> None:
        """Close all branches; the trunk goes on behind the furthest one.

        Raises:
            LayoutError: no branch is open.
        """
        if not self._branches:
            raise LayoutError("a join was asked for, but no branch is open; fork first")
        self._trunk = self.position
        self._branches = []
