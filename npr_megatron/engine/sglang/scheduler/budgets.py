"""How far the branches of a block may run ahead of a shared budget. Pure.

The client counts exactly: it takes the tokens of a block round by round, branch by branch, and cuts
where the budget ends. Until it has, branches go on decoding for nothing; here they are stopped as
soon as the tokens known to come before their next one use the budget up.
"""

from __future__ import annotations

from collections import OrderedDict

from npr_megatron.engine.sglang.stage import Budget

_MOST_BLOCKS = 1 << 16
"""Blocks that are counted; of still older ones some branch was given up unseen. Forgetting one lets
its branches stop later."""


class RoundBudget:
    """Tokens that the branches of one block have sampled."""

    def __init__(self) -> None:
        self._taken: dict[int, int] = {}
        self._open: set[int] = set()

    @property
    def is_over(self) -> bool:
        """Whether every branch that began has ended."""
        return not self._open

    def take(self, budget: Budget, num_taken: int) -> bool:
        """Note that a branch has ``num_taken`` tokens; return whether it must stop.

        In each round every open branch takes one token, in order. Before token ``n`` of branch
        ``b`` come ``n`` of each branch before it and ``n - 1`` of each behind it, or all that the
        branch has: one that is behind may still take more, so this stops late, never early.
        """
        self._taken[budget.branch] = num_taken
        self._open.add(budget.branch)
        before = sum(
            min(taken, num_taken + (branch < budget.branch))
            for branch, taken in self._taken.items()
        )
        return before >= budget.num_tokens

    def end(self, branch: int) -> None:
        """Note that a branch takes no more tokens; those it has still count."""
        self._open.discard(branch)


class BudgetBook:
    """The budgets of all blocks that are decoded; a block is forgotten when its branches end."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[str, RoundBudget] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def take(self, budget: Budget, num_taken: int, *, has_ended: bool) -> bool:
        """Note how many tokens a branch has sampled and whether it ended; return whether it must.

        A branch that must stop has ended for the book.
        """
        block = self._blocks.setdefault(budget.name, RoundBudget())
        must_stop = block.take(budget, num_taken)
        if has_ended or must_stop:
            block.end(budget.branch)
        if block.is_over:
            del self._blocks[budget.name]
        while len(self._blocks) > _MOST_BLOCKS:
            self._blocks.popitem(last=False)
        return must_stop
